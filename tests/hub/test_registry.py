"""Blobs, manifests, tags and referrers as clients see them through one repository."""

import asyncio
import json
import logging
from hashlib import sha256
from typing import Any

import pytest

from corral.core.records import Principal, Visitor
from corral.core.registry import Right, Visibility
from corral.hub.links import LEASE
from corral.hub.registry import MAX_REFERRERS_BYTES, MAX_TAG_PARAMETERS, MAX_TAGS, TagPage
from corral.hub.repositories import Caller
from corral.hub.uploads import Mounted
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES, MODEL_LAYER
from corral.wire.names import Digest
from corral.wire.registry import OCI_INDEX_TYPE, OCI_MANIFEST_TYPE
from corral.wire.repositories import RepositoryName
from fakes_registry import digest_of
from identity_hub import error_of
from registry_hub import CONFIG, OTHER, TINY, RegistryHub, a_manifest, with_token

ABSENT = Digest("0" * 64)


@pytest.fixture
def hub() -> RegistryHub:
    return RegistryHub()


@pytest.fixture
async def alice(hub: RegistryHub) -> Principal:
    return await hub.add("alice")


@pytest.fixture
async def bob(hub: RegistryHub) -> Principal:
    return await hub.add("bob")


async def put(hub: RegistryHub, caller: Caller, body: bytes, reference: str = "latest", *, name: RepositoryName = TINY) -> Digest:
    digest, _ = await hub.registry.put_manifest(name, reference, caller, body, MANIFEST_TYPE)
    return digest


async def tags(hub: RegistryHub, caller: Caller, name: RepositoryName = TINY) -> list[str]:
    return list((await hub.registry.tags(name, caller)).names)


# ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f11_t030_blob_is_there_through_a_repository_that_has_it_alone(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    digest = await hub.push_blob(TINY, alice, b"secret")
    await hub.push_blob(OTHER, bob, b"own")
    await hub.repositories.set_visibility(OTHER, bob, Visibility.PUBLIC)
    for name, caller in ((OTHER, bob), (OTHER, None), (OTHER, alice)):
        wrong = [await error_of(hub.registry.blob(name, one, caller)) for one in (digest, ABSENT)]
        assert [(error.code, error.message) for error in wrong] == [(wrong[1].code, wrong[1].message)] * 2
        assert wrong[0].code == "blob_unknown"
    assert (await error_of(hub.registry.blob(TINY, digest, bob))).code == "name_unknown"
    assert (await hub.registry.blob(TINY, digest, alice)).size_bytes == 6


async def test_t038_blob_deleted_in_one_repository_stays_in_the_other(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"shared")
    await hub.push_blob(OTHER, bob, b"shared")
    await hub.registry.remove_blob(TINY, digest, alice)
    assert (await error_of(hub.registry.blob(TINY, digest, alice))).code == "blob_unknown"
    assert (await error_of(hub.registry.remove_blob(TINY, digest, alice))).code == "blob_unknown"
    assert (await hub.registry.blob(OTHER, digest, bob)).size_bytes == 6
    await hub.push_blob(TINY, alice, b"again")
    assert (await error_of(hub.registry.blob(TINY, digest, alice))).code == "blob_unknown"


async def test_blob_that_a_manifest_names_is_not_deleted(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push(TINY, alice)
    assert (await error_of(hub.registry.remove_blob(TINY, digest_of(b"weights"), alice))).code == "unsupported"
    await hub.registry.remove_manifest(TINY, str(digest), alice)
    await hub.registry.remove_blob(TINY, digest_of(b"weights"), alice)


async def test_f24_blob_whose_file_is_lost_is_unknown_and_told_of_once(
    hub: RegistryHub, alice: Principal, caplog: pytest.LogCaptureFixture
) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    hub.files.blobs[digest] = b"weig"
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert (await error_of(hub.registry.blob(TINY, digest, alice))).code == "blob_unknown"
    assert [str(digest) in record.getMessage() for record in caplog.records] == [True]


async def test_f12_blob_that_a_pusher_was_told_of_is_kept_for_the_time_of_a_push(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    almost = LEASE.total_seconds() - 60
    for _ in range(3):
        hub.clock.advance(almost)
        assert (await hub.registry.blob(TINY, digest, alice)).digest == digest
        assert await hub.store.unnamed_links(now=hub.clock.now(), limit=10) == 0
    hub.clock.advance(LEASE.total_seconds())
    assert await hub.store.unnamed_links(now=hub.clock.now(), limit=10) == 1
    assert (await error_of(hub.registry.blob(TINY, digest, alice))).code == "blob_unknown"


async def test_f12_blob_that_others_pull_is_not_kept_for_them(
    hub: RegistryHub, alice: Principal, bob: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    written: list[Digest] = []
    link_blob = hub.store.link_blob

    async def counting(repository_id: str, linked: Digest, **options: Any) -> bool:
        written.append(linked)
        return await link_blob(repository_id, linked, **options)

    monkeypatch.setattr(hub.store, "link_blob", counting)
    pulling = with_token(alice.account, {"alice/tiny": ["pull"]})
    for caller in (None, Visitor(), bob, pulling):
        await hub.registry.blob(TINY, digest, caller)
    assert written == []
    for _ in range(3):
        await hub.registry.blob(TINY, digest, with_token(alice.account, {"alice/tiny": ["pull", "push"]}))
    assert written == [digest]
    hub.accounts.fails = CorralError("unavailable")
    hub.clock.advance(3600)
    assert (await error_of(hub.registry.blob(TINY, digest, bob))).code == "unavailable"


async def test_f12_blob_that_was_collected_while_it_was_looked_at_is_unknown(
    hub: RegistryHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")

    async def collected(*arguments: object, **options: object) -> bool:
        return False

    monkeypatch.setattr(hub.store, "link_blob", collected)
    assert (await error_of(hub.registry.blob(TINY, digest, alice))).code == "blob_unknown"
    assert not isinstance(await hub.registry.start_upload(TINY, alice, expected=digest), Mounted)


# ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_manifest_is_served_by_tag_and_digest_byte_for_byte(hub: RegistryHub, alice: Principal) -> None:
    body = a_manifest(b"weights") + b"\n"
    await hub.push(TINY, alice)
    digest = await put(hub, alice, body, "v1")
    assert digest == Digest(sha256(body).hexdigest())
    for reference in ("v1", "V1", str(digest)):
        found = await hub.registry.manifest(TINY, reference, alice)
        assert (found.body, found.media_type, found.digest) == (body, MANIFEST_TYPE, digest)


async def test_manifest_by_digest_is_verified_also_as_sha512(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    body = a_manifest(b"weights", annotations={"a": "b"})
    for algorithm in ("sha256", "sha512"):
        right, wrong = digest_of(body, algorithm), digest_of(b"other", algorithm)
        assert await put(hub, alice, body, str(right)) == right
        assert (await hub.registry.manifest(TINY, str(right), alice)).body == body
        assert (await error_of(put(hub, alice, body, str(wrong)))).code == "digest_invalid"


@pytest.mark.parametrize("reference", [".INVALID_MANIFEST_NAME", "no", "a/b", "x" * 129, str(ABSENT), ""])
async def test_manifest_that_is_not_there_is_unknown(hub: RegistryHub, alice: Principal, reference: str) -> None:
    await hub.push(TINY, alice)
    assert (await error_of(hub.registry.manifest(TINY, reference, alice))).code == "manifest_unknown"


@pytest.mark.parametrize("reference", ["sha256:../../x", "sha256:" + "0" * 63, "sha256:" + "A" * 64, "md5:" + "0" * 32, "x:y"])
async def test_f08_manifest_by_a_digest_that_is_none_is_refused(hub: RegistryHub, alice: Principal, reference: str) -> None:
    await hub.push(TINY, alice)
    for doing in (
        hub.registry.manifest(TINY, reference, alice),
        put(hub, alice, a_manifest(b"weights"), reference),
        hub.registry.remove_manifest(TINY, reference, alice),
    ):
        assert (await error_of(doing)).code == "digest_invalid"


@pytest.mark.parametrize("tag", ["local", "LOCAL", "cloud", "7b-cloud", "7B-CLOUD", ".x", "-x", "a/b", "", "x" * 129])
async def test_f09_tag_that_could_never_be_pulled_is_refused(hub: RegistryHub, alice: Principal, tag: str) -> None:
    await hub.push(TINY, alice)
    assert (await error_of(put(hub, alice, a_manifest(b"weights"), tag))).code == "manifest_invalid"
    further = hub.registry.put_manifest(TINY, "ok", alice, a_manifest(b"weights"), MANIFEST_TYPE, [tag])
    assert (await error_of(further)).code == "manifest_invalid"
    assert await tags(hub, alice) == ["latest"]


async def test_manifest_is_put_under_several_tags_at_once(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    body = a_manifest(b"weights", annotations={"n": "1"})
    digest, _ = await hub.registry.put_manifest(TINY, str(digest_of(body)), alice, body, MANIFEST_TYPE, ["a", "b", "a"])
    await hub.registry.put_manifest(TINY, "c", alice, body, MANIFEST_TYPE, ["d"])
    assert await tags(hub, alice) == ["a", "b", "c", "d", "latest"]
    assert (await hub.registry.manifest(TINY, "b", alice)).digest == digest
    many = [f"t{number}" for number in range(MAX_TAG_PARAMETERS + 1)]
    error = await error_of(hub.registry.put_manifest(TINY, str(digest), alice, body, MANIFEST_TYPE, many))
    assert error.code == "manifest_invalid"


async def test_t031_manifest_that_names_what_only_others_have_is_refused(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    await hub.push(TINY, alice)
    await hub.push_blob(OTHER, bob, CONFIG)
    error = await error_of(put(hub, bob, a_manifest(b"weights"), name=OTHER))
    assert (error.status, error.code) == (400, "manifest_blob_unknown")
    assert (await error_of(put(hub, bob, a_manifest(b"nowhere"), name=OTHER))).code == "manifest_blob_unknown"
    await hub.push_blob(OTHER, bob, b"weights")
    await put(hub, bob, a_manifest(b"weights"), name=OTHER)


async def test_manifest_takes_blobs_that_the_caller_may_pull_elsewhere(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    await hub.push(TINY, alice)
    new = RepositoryName("alice", "new")
    narrow = with_token(alice.account, {"alice/new": ["pull", "push"]})
    assert (await error_of(put(hub, narrow, a_manifest(b"weights"), name=new))).code == "manifest_blob_unknown"
    await put(hub, alice, a_manifest(b"weights"), name=new)
    assert (await hub.registry.blob(new, digest_of(b"weights"), narrow)).size_bytes == 7
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    await put(hub, bob, a_manifest(b"weights"), name=OTHER)


async def test_f16_manifest_that_lies_is_refused(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    lying = json.loads(a_manifest(b"weights"))
    lying["layers"][0]["size"] = 8
    assert (await error_of(put(hub, alice, json.dumps(lying).encode()))).code == "manifest_invalid"
    other = hub.registry.put_manifest(TINY, "x", alice, a_manifest(b"weights"), OCI_MANIFEST_TYPE)
    assert (await error_of(other)).code == "manifest_invalid"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"config":' * 40 + b"{}" + b"}" * 40,
        b'{"schemaVersion":2,"layers":[],"layers":[]}',
        a_manifest(b"weights", manifests=[]),
        a_manifest(b"weights").replace(b'"size": 7', b'"size": -1'),
        a_manifest(b"weights").replace(b'"size": 7', b'"size": NaN'),
        a_manifest(b"weights").replace(b'"size": 7', b'"size": 9223372036854775808'),
        b" " * (100 << 10) + b"no JSON",
        b"",
    ],
)
async def test_f15_t036_hostile_manifest_is_refused(hub: RegistryHub, alice: Principal, body: bytes) -> None:
    await hub.push(TINY, alice)
    assert (await error_of(put(hub, alice, body))).code == "manifest_invalid"


@pytest.mark.parametrize(
    ("body", "reference"),
    [(b"[]", "latest"), (a_manifest(b"never sent"), "latest"), (a_manifest(), "cloud"), (a_manifest(), "sha256:" + "0" * 64)],
)
async def test_refused_manifest_leaves_no_repository(hub: RegistryHub, alice: Principal, body: bytes, reference: str) -> None:
    await error_of(put(hub, alice, body, reference))
    assert list(await hub.repositories.visible("alice", alice)) == []


async def test_refused_manifest_leaves_a_repository_that_somebody_pushes_to(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    assert (await error_of(put(hub, alice, a_manifest(b"weights", b"never sent")))).code == "manifest_blob_unknown"
    assert (await hub.registry.blob(TINY, digest, alice)).size_bytes == 7


async def test_f15_t036_manifest_beyond_the_limit_is_refused_by_its_length(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    assert (await error_of(put(hub, alice, b" " * (MAX_MANIFEST_BYTES + 1)))).code == "too_large"
    large = a_manifest(b"weights", annotations={f"k{number}": "x" * 1000 for number in range(390)})
    assert (await hub.registry.manifest(TINY, str(await put(hub, alice, large)), alice)).body == large


async def test_manifest_with_null_layers_or_an_empty_config_is_taken(hub: RegistryHub, alice: Principal) -> None:
    await hub.push_blob(TINY, alice, CONFIG)
    await put(hub, alice, a_manifest(layers=None), "stub")
    await put(hub, alice, a_manifest(config={"mediaType": "", "digest": "", "size": 0}), "odd")
    assert await tags(hub, alice) == ["odd", "stub"]


async def test_layers_that_may_be_fetched_elsewhere_need_not_be_here(hub: RegistryHub, alice: Principal) -> None:
    await hub.push_blob(TINY, alice, CONFIG)
    media_type = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    foreign = {"mediaType": media_type, "digest": str(ABSENT), "size": 9, "urls": ["http://169.254.169.254/"]}
    await put(hub, alice, a_manifest(layers=[foreign]))


async def test_t031_model_layer_with_urls_of_what_only_others_have_is_refused(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    # What it names would be described on a page, and run: by its digest alone, whoever it belongs to.
    private = await hub.push_blob(OTHER, bob, b"of bob alone")
    await hub.push_blob(TINY, alice, CONFIG)
    layer = {"mediaType": MODEL_LAYER, "digest": str(private), "size": 12, "urls": ["https://e.example/"]}
    assert (await error_of(put(hub, alice, a_manifest(layers=[layer])))).code == "manifest_blob_unknown"


async def test_t041_f13_of_two_manifests_for_one_tag_one_wins_whole(hub: RegistryHub, alice: Principal) -> None:
    bodies = [a_manifest(b"weights", annotations={"n": str(number)}) for number in range(5)]
    await hub.push(TINY, alice)
    digests = await asyncio.gather(*(put(hub, alice, body, "race") for body in bodies))
    assert (await hub.registry.manifest(TINY, "race", alice)).body in bodies
    for digest, body in zip(digests, bodies, strict=True):
        assert (await hub.registry.manifest(TINY, str(digest), alice)).body == body


async def test_f14_manifest_and_the_deletion_of_its_blob_do_not_both_succeed(hub: RegistryHub, alice: Principal) -> None:
    await hub.push_blob(TINY, alice, CONFIG)
    digest = await hub.push_blob(TINY, alice, b"weights")
    outcomes = await asyncio.gather(
        put(hub, alice, a_manifest(b"weights")), hub.registry.remove_blob(TINY, digest, alice), return_exceptions=True
    )
    assert sum(isinstance(outcome, Exception) for outcome in outcomes) == 1


async def test_t120_tag_that_moves_leaves_the_old_manifest_and_its_blobs(hub: RegistryHub, alice: Principal) -> None:
    old = await hub.push(TINY, alice, b"old")
    await hub.push(TINY, alice, b"new")
    assert (await hub.registry.manifest(TINY, "latest", alice)).digest != old
    assert (await hub.registry.manifest(TINY, str(old), alice)).digest == old
    assert (await hub.registry.blob(TINY, digest_of(b"old"), alice)).size_bytes == 3


# ── Deleting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_deleted_tag_leaves_the_manifest_and_a_deleted_manifest_takes_its_tags(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push(TINY, alice)
    await put(hub, alice, a_manifest(b"weights"), "second")
    await hub.registry.remove_manifest(TINY, "second", alice)
    assert await tags(hub, alice) == ["latest"]
    await hub.registry.remove_manifest(TINY, str(digest), alice)
    assert await tags(hub, alice) == []
    for reference in ("latest", "second", str(digest)):
        assert (await error_of(hub.registry.remove_manifest(TINY, reference, alice))).code == "manifest_unknown"


async def test_t038_whoever_may_only_push_deletes_nothing(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    digest = await hub.push(TINY, alice)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    for doing in (
        hub.registry.remove_manifest(TINY, "latest", bob),
        hub.registry.remove_manifest(TINY, str(digest), bob),
        hub.registry.remove_blob(TINY, digest_of(b"weights"), bob),
    ):
        assert (await error_of(doing)).status == 403
    pushing = with_token(alice.account, {"alice/tiny": ["pull", "push"]})
    assert (await error_of(hub.registry.remove_manifest(TINY, "latest", pushing))).code == "unauthorized"
    assert await tags(hub, bob) == ["latest"]


# ── Listings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tags_come_in_pages_in_one_order(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice, tag="b")
    await hub.registry.put_manifest(TINY, "A", alice, a_manifest(b"weights"), MANIFEST_TYPE, ["a", "C", "d"])
    page = hub.registry.tags
    assert await page(TINY, alice) == TagPage(("A", "a", "b", "C", "d"))
    assert await page(TINY, alice, limit=2) == TagPage(("A", "a"), "a")
    assert await page(TINY, alice, limit=2, last="a") == TagPage(("b", "C"), "C")
    assert await page(TINY, alice, limit=2, last="C") == TagPage(("d",))
    assert await page(TINY, alice, last="zzz") == TagPage(())
    assert await page(TINY, alice, limit=0) == TagPage(())


async def test_t037_page_of_tags_is_never_longer_than_the_limit(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    names = [f"t{number:04}" for number in range(MAX_TAGS + 1)]
    for first in range(0, len(names), MAX_TAG_PARAMETERS):
        some = names[first : first + MAX_TAG_PARAMETERS]
        await hub.registry.put_manifest(TINY, some[0], alice, a_manifest(b"weights"), MANIFEST_TYPE, some[1:])
    for limit in (None, 10**12):
        page = await hub.registry.tags(TINY, alice, limit=limit)
        assert (len(page.names), page.last) == (MAX_TAGS, page.names[-1])


async def test_referrers_are_listed_with_what_they_say_of_themselves(hub: RegistryHub, alice: Principal) -> None:
    subject = await hub.push(TINY, alice)
    described = {"mediaType": MANIFEST_TYPE, "digest": str(subject), "size": 1}
    body = a_manifest(b"weights", subject=described, artifactType="a/b", annotations={"k": "v"})
    digest, told = await hub.registry.put_manifest(TINY, str(digest_of(body)), alice, body, MANIFEST_TYPE)
    assert told == subject
    index = json.loads((await hub.registry.referrers(TINY, subject, alice)).index)
    assert index["mediaType"] == OCI_INDEX_TYPE
    assert index["manifests"] == [
        {"mediaType": MANIFEST_TYPE, "digest": str(digest), "size": len(body), "artifactType": "a/b", "annotations": {"k": "v"}}
    ]
    assert json.loads((await hub.registry.referrers(TINY, subject, alice, artifact_type="x/y")).index)["manifests"] == []
    await hub.registry.remove_manifest(TINY, str(digest), alice)
    assert json.loads((await hub.registry.referrers(TINY, subject, alice)).index)["manifests"] == []


async def test_t037_page_of_referrers_is_never_longer_than_the_limits(hub: RegistryHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    described = {"mediaType": MANIFEST_TYPE, "digest": str(ABSENT), "size": 1}
    long = {"a": "x" * (MAX_REFERRERS_BYTES // 3)}
    for number in range(4):
        await put(hub, alice, a_manifest(b"weights", subject=described, annotations=long | {"n": str(number)}), f"t{number}")
    first = await hub.registry.referrers(TINY, ABSENT, alice)
    assert len(first.index) < MAX_REFERRERS_BYTES
    rest = await hub.registry.referrers(TINY, ABSENT, alice, last=first.last)
    assert rest.last == ""
    numbers = [one["annotations"]["n"] for page in (first, rest) for one in json.loads(page.index)["manifests"]]
    assert sorted(numbers) == ["0", "1", "2", "3"]


async def test_referrers_of_what_is_not_there_are_none_for_whoever_could_put_it_there(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    assert json.loads((await hub.registry.referrers(TINY, ABSENT, alice)).index)["manifests"] == []
    assert await hub.store.repository("alice", "tiny") is None
    assert (await error_of(hub.registry.referrers(TINY, ABSENT, bob))).code == "name_unknown"


async def test_t029_every_verb_answers_for_a_private_repository_as_for_an_absent_one(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    digest = await hub.push(TINY, alice)
    for caller, code in ((None, "unauthorized"), (bob, "name_unknown"), (Visitor(), "name_unknown")):
        for name in (TINY, RepositoryName("alice", "absent")):
            for doing in (
                hub.registry.blob(name, digest_of(b"weights"), caller),
                hub.registry.manifest(name, "latest", caller),
                hub.registry.manifest(name, str(digest), caller),
                hub.registry.manifest(name, "latest-cloud", caller),
                hub.registry.tags(name, caller),
                hub.registry.referrers(name, digest, caller),
            ):
                assert (await error_of(doing)).code == code


async def test_f25_nothing_of_a_manifest_is_ever_fetched(hub: RegistryHub, alice: Principal) -> None:
    """The services have no way to: what they hold is a store, files and a clock."""
    await hub.push_blob(TINY, alice, b'{"remote_host":"http://169.254.169.254","remote_model":"x"}')
    config = b'{"remote_host":"http://169.254.169.254","remote_model":"x"}'
    described = {"mediaType": "application/json", "digest": str(digest_of(config)), "size": len(config)}
    await put(hub, alice, a_manifest(layers=None, config=described))
    assert (await hub.registry.manifest(TINY, "latest", alice)).media_type == MANIFEST_TYPE
