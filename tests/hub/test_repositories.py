"""Who may do what in which repository, and what its owner decides."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from corral.core.records import Principal, Scope, Visitor
from corral.core.registry import Repository, Right, Visibility
from corral.hub.repositories import MAX_README_BYTES, Caller
from corral.wire.errors import CorralError, registry_body
from corral.wire.names import Digest
from corral.wire.registry import ScopeRequest, parse_scopes
from corral.wire.repositories import RepositoryName
from fakes_registry import digest_of
from identity_hub import error_of
from registry_hub import LIBRARY, TINY, RegistryHub, with_key, with_token

DEVICE = Visitor(fingerprint="SHA256:abc", signin_url="https://hub.example/connect?key=k")
EVERYTHING = ScopeRequest("repository", "alice/tiny", frozenset({"pull", "push", "delete"}))


@pytest.fixture
def hub() -> RegistryHub:
    return RegistryHub()


@pytest.fixture
async def alice(hub: RegistryHub) -> Principal:
    return await hub.add("Alice")


@pytest.fixture
async def bob(hub: RegistryHub) -> Principal:
    return await hub.add("bob")


async def outcome(hub: RegistryHub, name: RepositoryName, right: Right, caller: Caller) -> str:
    """`ok`, or the code of the refusal."""
    try:
        await hub.repositories.find_existing(name, right, caller)
    except CorralError as error:
        return error.code
    return "ok"


async def outcomes(hub: RegistryHub, name: RepositoryName, caller: Caller) -> list[str]:
    """For pull, push and delete."""
    return [await outcome(hub, name, right, caller) for right in Right]


async def publish(hub: RegistryHub, name: RepositoryName, owner: Principal) -> Repository:
    await hub.repositories.find(name, Right.PUSH, owner)
    return await hub.repositories.set_visibility(name, owner, Visibility.PUBLIC)


# ── How many ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_account_has_so_many_repositories_and_no_more() -> None:
    hub = RegistryHub(max_repositories=2)
    alice, bob, admin = await hub.add("Alice"), await hub.add("bob"), await hub.add("root", is_admin=True)
    for name in ("one", "two"):
        await hub.repositories.find(RepositoryName("alice", name), Right.PUSH, alice)
    third = RepositoryName("alice", "three")
    refused = await error_of(hub.repositories.find(third, Right.PUSH, alice))
    assert refused.code == "forbidden"
    text = "Alice has 2 repositories, which is as many as an account may have on this hub; delete one first"
    assert refused.message == text
    assert await hub.repositories.find_or_none(third, Right.PUSH, alice) is None
    await hub.repositories.find(RepositoryName("alice", "TWO"), Right.PUSH, alice)
    await hub.repositories.find(RepositoryName("bob", "one"), Right.PUSH, bob)
    # The library is the administrators', who know how large their disk is.
    for number in range(4):
        await hub.repositories.find(RepositoryName("library", f"m{number}"), Right.PUSH, admin)
    await hub.repositories.remove(RepositoryName("alice", "one"), alice)
    assert (await hub.repositories.find(third, Right.PUSH, alice)).path == "Alice/three"


async def test_no_limit_on_repositories_is_none() -> None:
    hub = RegistryHub(max_repositories=0)
    alice = await hub.add("alice")
    for number in range(5):
        await hub.repositories.find(RepositoryName("alice", f"m{number}"), Right.PUSH, alice)


# ── Making one ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_repository_is_made_by_its_owners_first_push_and_private(hub: RegistryHub, alice: Principal) -> None:
    made = await hub.repositories.find(RepositoryName("aLICE", "Tiny"), Right.PUSH, alice)
    assert (made.path, made.visibility) == ("Alice/Tiny", Visibility.PRIVATE)
    assert await hub.repositories.find(TINY, Right.PUSH, alice) == made


async def test_repository_is_not_made_by_a_pull(hub: RegistryHub, alice: Principal) -> None:
    for right in (Right.PULL, Right.DELETE):
        assert (await error_of(hub.repositories.find(TINY, right, alice))).code == "name_unknown"
    assert await hub.store.repository("alice", "tiny") is None
    assert await hub.repositories.find_or_none(TINY, Right.PULL, alice) is None


async def test_repository_in_another_namespace_is_not_made(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    error = await error_of(hub.repositories.find(TINY, Right.PUSH, bob))
    assert error.code == "forbidden"
    assert "unauthorized" not in error.message.lower()
    assert "access denied" not in error.message.lower()
    assert await hub.store.repository("alice", "tiny") is None


async def test_library_is_the_administrators(hub: RegistryHub, alice: Principal) -> None:
    root = await hub.add("root", is_admin=True)
    assert (await error_of(hub.repositories.find(LIBRARY, Right.PUSH, alice))).code == "forbidden"
    assert (await hub.repositories.find(LIBRARY, Right.PUSH, root)).path == "library/llama"
    assert await outcomes(hub, LIBRARY, alice) == ["name_unknown", "forbidden", "forbidden"]
    assert await outcome(hub, TINY, Right.PUSH, root) == "forbidden"


async def test_nested_name_belongs_to_its_first_component(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    nested = RepositoryName("alice", "bob/deep")
    assert (await hub.repositories.find(nested, Right.PUSH, alice)).path == "Alice/bob/deep"
    assert await outcome(hub, nested, Right.PULL, bob) == "name_unknown"


# ── The decision, row by row ─────────────────────────────────────────────────────────────────────────────────────────


async def test_t029_private_repository_answers_as_one_that_does_not_exist(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    absent = RepositoryName("alice", "absent")
    callers: list[Caller] = [None, Visitor(), DEVICE, bob, with_token(bob.account, {}), with_key(alice.account, frozenset())]
    for caller in callers:
        for right in Right:
            errors = [await error_of(hub.repositories.find_existing(name, right, caller)) for name in (TINY, absent)]
            bodies = [str(registry_body(error)).replace("absent", "tiny") for error in errors]
            assert bodies[0] == bodies[1]
            assert len({(error.status, str(error.headers)) for error in errors}) == 1
            assert errors[0].code == (
                "unauthorized" if caller is None else "name_unknown" if _is_pull(caller, right) else "forbidden"
            )


def _is_pull(caller: Caller, right: Right) -> bool:
    return right is Right.PULL and not (isinstance(caller, Principal) and not caller.scopes)


async def test_t029_private_repository_costs_the_same_look_ups_as_an_absent_one(
    hub: RegistryHub, alice: Principal, bob: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    asked = _count(hub, monkeypatch)
    for caller in (None, DEVICE, bob, with_token(bob.account, {})):
        costs = []
        for name in (TINY, RepositoryName("alice", "absent")):
            asked.clear()
            hub.accounts.calls.clear()
            await outcome(hub, name, Right.PULL, caller)
            costs.append((dict(asked), dict(hub.accounts.calls)))
        assert costs[0] == costs[1]


def _count(hub: RegistryHub, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what the store is asked: the fake does not, and time cannot be measured in a unit test."""
    asked: Counter[str] = Counter()
    for verb in ("repository", "right_of", "sources_of", "blob_size"):
        original = getattr(hub.store, verb)

        async def counted(*arguments: Any, _verb: str = verb, _original: Any = original, **options: Any) -> Any:
            asked[_verb] += 1
            return await _original(*arguments, **options)

        monkeypatch.setattr(hub.store, verb, counted)
    return asked


async def test_public_repository_is_pulled_by_anybody_and_pushed_by_its_own(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    await publish(hub, TINY, alice)
    for caller in (None, Visitor(), DEVICE, bob, with_token(bob.account, {}), with_key(bob.account, frozenset())):
        assert await outcome(hub, TINY, Right.PULL, caller) == "ok"
    assert await outcomes(hub, TINY, None) == ["ok", "unauthorized", "unauthorized"]
    assert await outcomes(hub, TINY, bob) == ["ok", "forbidden", "forbidden"]
    assert await outcomes(hub, TINY, alice) == ["ok", "ok", "ok"]


async def test_unconnected_device_that_pushes_is_told_its_key_and_where_to_connect_it(hub: RegistryHub) -> None:
    error = await error_of(hub.repositories.find(TINY, Right.PUSH, DEVICE))
    assert error.status == 403
    assert DEVICE.fingerprint in error.message
    assert DEVICE.signin_url in error.message
    assert error.detail == {"signin_url": DEVICE.signin_url}
    assert "account" in (await error_of(hub.repositories.find(TINY, Right.PUSH, Visitor()))).message


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        ({Scope.PULL}, ["ok", "forbidden", "forbidden"]),
        ({Scope.PUSH}, ["forbidden", "ok", "ok"]),
        ({Scope.INFERENCE, Scope.KEYS}, ["forbidden", "forbidden", "forbidden"]),
        ({Scope.PULL, Scope.PUSH}, ["ok", "ok", "ok"]),
    ],
)
async def test_credential_is_good_for_its_scopes_alone(
    hub: RegistryHub, alice: Principal, scopes: set[Scope], expected: list[str]
) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    assert await outcomes(hub, TINY, replace(alice, scopes=frozenset(scopes))) == expected


@pytest.mark.parametrize(
    ("grants", "expected"),
    [
        ({}, ["unauthorized", "unauthorized", "unauthorized"]),
        ({"alice/tiny": ["pull"]}, ["ok", "unauthorized", "unauthorized"]),
        ({"alice/tiny": ["push"]}, ["ok", "ok", "unauthorized"]),
        ({"alice/tiny": ["pull", "push", "delete"]}, ["ok", "ok", "ok"]),
        ({"alice/other": ["pull", "push", "delete"]}, ["unauthorized", "unauthorized", "unauthorized"]),
    ],
)
async def test_t027_token_is_good_for_what_it_grants_alone(
    hub: RegistryHub, alice: Principal, grants: dict[str, list[str]], expected: list[str]
) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    assert await outcomes(hub, TINY, with_token(alice.account, grants)) == expected


async def test_f19_token_that_lacks_what_its_holder_may_names_the_scope_to_ask_for(hub: RegistryHub, alice: Principal) -> None:
    token = with_token(alice.account, {"alice/tiny": ["pull"]})
    error = await error_of(hub.repositories.find(RepositoryName("alice", "Tiny"), Right.PUSH, token))
    assert error.detail == {"error": "insufficient_scope", "scope": "repository:alice/Tiny:pull,push"}
    assert await hub.store.repository("alice", "tiny") is None


async def test_f19_token_of_somebody_who_lost_the_right_is_worth_nothing_at_once(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    token = with_token(bob.account, {"alice/tiny": ["pull", "push"]})
    assert await outcomes(hub, TINY, token) == ["ok", "ok", "forbidden"]
    await hub.repositories.set_collaborator(TINY, alice, "bob", None)
    # Not 401: a client with a good token would fetch another one for ever.
    assert await outcomes(hub, TINY, token) == ["name_unknown", "forbidden", "forbidden"]


# ── Deleted and disabled accounts ────────────────────────────────────────────────────────────────────────────────────


async def test_t119_what_a_deleted_account_left_is_gone_for_everybody(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    root = await hub.add("root", is_admin=True)
    await publish(hub, TINY, alice)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    await hub.accounts.remove(alice.account.id, now=hub.clock.now())
    for caller in (Visitor(), bob, root):
        assert (await outcomes(hub, TINY, caller))[:2] == ["name_unknown", "forbidden"]
    assert await outcome(hub, TINY, Right.PULL, None) == "unauthorized"
    assert await hub.repositories.visible("alice", bob) == []
    assert await hub.repositories.grantable(bob, EVERYTHING) == frozenset()
    assert (await error_of(hub.add("ALICE"))).code == "conflict"


async def test_content_of_a_disabled_account_comes_back_with_it(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.add("root", is_admin=True)
    await publish(hub, TINY, alice)
    await hub.accounts.set_disabled(alice.account.id, hub.clock.now())
    assert await outcome(hub, TINY, Right.PULL, bob) == "name_unknown"
    await hub.accounts.set_disabled(alice.account.id, None)
    assert await outcome(hub, TINY, Right.PULL, bob) == "ok"


# ── Collaborators ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t038_collaborator_pulls_or_pushes_and_never_deletes(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_collaborator(TINY, alice, "BOB", Right.PULL)
    assert await outcomes(hub, TINY, bob) == ["ok", "forbidden", "forbidden"]
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    assert await outcomes(hub, TINY, bob) == ["ok", "ok", "forbidden"]
    assert [(one.account.name, one.right) for one in await hub.repositories.collaborators(TINY, alice)] == [("bob", Right.PUSH)]
    assert (await error_of(hub.repositories.set_collaborator(TINY, alice, "bob", Right.DELETE))).code == "invalid"


async def test_collaborators_are_the_owners_business_alone(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    carol = await hub.add("carol")
    for doing in (
        hub.repositories.set_collaborator(TINY, bob, "carol", Right.PULL),
        hub.repositories.collaborators(TINY, bob),
        hub.repositories.set_visibility(TINY, bob, Visibility.PUBLIC),
        hub.repositories.remove(TINY, bob),
        hub.repositories.remove(TINY, carol),
    ):
        assert (await error_of(doing)).code == "forbidden"


async def test_collaborator_must_be_somebody_else_who_exists(hub: RegistryHub, alice: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    assert (await error_of(hub.repositories.set_collaborator(TINY, alice, "nobody\x1b[2J", Right.PULL))).code == "not_found"
    assert (await error_of(hub.repositories.set_collaborator(TINY, alice, "alice", Right.PULL))).code == "invalid"
    assert await hub.repositories.collaborators(TINY, alice) == []


# ── What tokens may be good for ──────────────────────────────────────────────────────────────────────────────────────


async def test_t026_grant_is_what_is_asked_and_allowed(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    grantable = hub.repositories.grantable
    # The owner's next push makes it, so a token for that is given before.
    assert await grantable(alice, EVERYTHING) == {"pull", "push", "delete"}
    await hub.repositories.find(TINY, Right.PUSH, alice)
    assert await grantable(alice, replace(EVERYTHING, actions=frozenset({"push"}))) == {"push"}
    assert await grantable(replace(alice, scopes=frozenset({Scope.PULL})), EVERYTHING) == {"pull"}
    assert await grantable(bob, EVERYTHING) == frozenset()
    assert await grantable(None, EVERYTHING) == frozenset()
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    assert await grantable(bob, EVERYTHING) == {"pull", "push"}
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    assert await grantable(None, EVERYTHING) == {"pull"}


async def test_t028_no_scope_is_ever_wider_than_the_rights(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    asked = ["registry:catalog:*", "*", "repository:../x:pull", "repository:alice/tiny:*", "repository:alice/*:pull"]
    asked += [f"repository:alice/r{number}:pull,push" for number in range(1000)]
    for scope in (*parse_scopes(asked), ScopeRequest("repository", "../x", frozenset({"pull"}))):
        assert await hub.repositories.grantable(bob, scope) == frozenset()
        assert await hub.repositories.grantable(None, scope) == frozenset()
    token = with_token(alice.account, {"alice/tiny": ["pull"]})
    assert await hub.repositories.grantable(token, EVERYTHING) == {"pull"}


# ── Sources of blobs ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f11_looking_for_a_source_costs_the_same_whether_others_have_the_blob(
    hub: RegistryHub, alice: Principal, bob: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await hub.push_blob(TINY, alice, b"secret")
    asked, costs = _count(hub, monkeypatch), []
    for digest in (held, Digest("0" * 64)):
        asked.clear()
        hub.accounts.calls.clear()
        assert await hub.repositories.find_source(digest, bob) is None
        costs.append((dict(asked), dict(hub.accounts.calls)))
    assert costs[0] == costs[1]


async def test_t032_source_is_found_by_what_the_token_may_read(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"content")
    found = await hub.repositories.find_source(digest, alice)
    assert found is not None
    assert found.path == "Alice/tiny"
    for token in (with_token(alice.account, {"alice/new": ["pull", "push"]}), replace(alice, scopes=frozenset({Scope.PUSH}))):
        assert await hub.repositories.find_source(digest_of(b"content"), token) is None
        assert await hub.repositories.find_readable(TINY, token) is None


# ── What the owner decides ───────────────────────────────────────────────────────────────────────────────────────────


async def test_changes_of_who_may_do_what_are_written_down_before_they_are_made(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    made = await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC, network="192.0.2.1")
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PULL)
    await hub.repositories.set_quota(TINY, 10)
    await hub.repositories.remove(TINY, alice)
    events = [event for event in hub.audit.events if event.subject == made.id]
    assert [(event.actor, event.action, event.note) for event in events] == [
        (alice.account.id, "repository.visibility", "Alice/tiny: public"),
        (alice.account.id, "repository.collaborator", "Alice/tiny: bob, pull"),
        ("console", "repository.quota", "Alice/tiny: 10 bytes"),
        (alice.account.id, "repository.remove", "Alice/tiny"),
    ]


async def test_change_that_cannot_be_written_down_does_not_happen(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    hub.audit.fails = CorralError("unavailable")
    for doing in (
        hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC),
        hub.repositories.set_collaborator(TINY, alice, "bob", Right.PULL),
        hub.repositories.remove(TINY, alice),
    ):
        assert (await error_of(doing)).code == "unavailable"
    assert await outcome(hub, TINY, Right.PULL, bob) == "name_unknown"
    assert await outcome(hub, TINY, Right.PULL, alice) == "ok"


async def test_removed_repository_is_gone_and_can_be_made_again(hub: RegistryHub, alice: Principal) -> None:
    old = await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.remove(TINY, alice)
    assert await outcome(hub, TINY, Right.PULL, alice) == "name_unknown"
    assert (await hub.repositories.find(TINY, Right.PUSH, alice)).id != old.id


async def test_readme_is_kept_for_those_who_push_and_bounded(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_readme(TINY, alice, "# Tiny")
    assert await hub.repositories.readme(TINY, alice) == "# Tiny"
    assert (await error_of(hub.repositories.readme(TINY, bob))).code == "name_unknown"
    assert (await error_of(hub.repositories.set_readme(TINY, bob, "x"))).code == "forbidden"
    assert (await error_of(hub.repositories.set_readme(TINY, alice, "ü" * MAX_README_BYTES))).code == "too_large"
    assert (await error_of(hub.repositories.set_readme(TINY, alice, "\ud800"))).code == "invalid"
    assert (await error_of(hub.repositories.set_readme(RepositoryName("alice", "no"), alice, "x"))).code == "name_unknown"


async def test_visible_repositories_of_a_namespace_depend_on_who_asks(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await publish(hub, RepositoryName("alice", "open"), alice)
    assert [one.name for one in await hub.repositories.visible("ALICE", alice)] == ["open", "tiny"]
    for caller in (None, DEVICE, bob):
        assert [one.name for one in await hub.repositories.visible("alice", caller)] == ["open"]


async def test_quota_that_is_none_is_refused(hub: RegistryHub, alice: Principal) -> None:
    assert (await error_of(hub.repositories.set_quota(TINY, 5))).code == "name_unknown"
    await hub.repositories.find(TINY, Right.PUSH, alice)
    assert (await error_of(hub.repositories.set_quota(TINY, -1))).code == "invalid"
    await hub.repositories.set_quota(TINY, None)


async def test_broken_store_is_no_refusal(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await publish(hub, TINY, alice)
    hub.accounts.fails = CorralError("unavailable")
    assert (await error_of(hub.repositories.find_readable(TINY, bob))).code == "unavailable"
