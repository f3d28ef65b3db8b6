"""Bodies that take their time, over real sockets: who sends one may lose what let them in before all of it is there (T62)."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from corral.core.records import Device, Scope
from corral.core.registry import Grant, Right
from corral.edges.connection import State, connection_factory
from corral.wire.manifest import MANIFEST_TYPE
from edges.test_registry_api import HOST, WEIGHTS, Served, path_of
from edges.test_registry_cases import MANIFESTS, UPLOADS, account_of, token_for
from fakes_registry import digest_of
from registry_hub import CONFIG, TINY, a_manifest, with_key

pytestmark = pytest.mark.flow

MANIFEST = a_manifest(CONFIG)
KINDS = ["post", "patch", "repeated patch", "final put", "direct put", "manifest"]
Meanwhile = Callable[["Late"], Awaitable[object]]


class Late(Served):
    """The registry behind a real socket. session_path: the upload that `send` writes to, if the kind of body has one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.state = State()
        self.port = 0
        self.session_path = ""

    async def send(self, kind: str, meanwhile: Meanwhile, headers: dict[str, str] | None = None) -> int:
        """The status for one kind of body, half of which is sent before something happens and half after it. headers: who sends
        it, if not alice with her API key."""
        proof = headers or {"authorization": "Basic " + b64encode(f"alice:{self.keys['alice']}".encode()).decode()}
        method, target, body, more = await self._of(kind, proof)
        sent = {**({} if kind == "direct put" else proof), **more, "host": HOST, "content-length": str(len(body))}
        # The server says 100 once somebody who was let in is asked for the body.
        sent["expect"] = "100-continue"
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        async with asyncio.timeout(20):
            writer.write("\r\n".join(lines).encode())
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(body[: len(body) // 2])
            await meanwhile(self)
            writer.write(body[len(body) // 2 :])
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.close()
        return int(answer.split()[1])

    async def _of(self, kind: str, proof: dict[str, str]) -> tuple[str, str, bytes, dict[str, str]]:
        """Method, target, body and headers."""
        digest = digest_of(WEIGHTS)
        if kind == "post":
            return "POST", f"{UPLOADS}?digest={digest}", WEIGHTS, {}
        if kind == "manifest":
            assert (await self("POST", f"{UPLOADS}?digest={digest_of(CONFIG)}", CONFIG, by="", headers=proof)).status == 201
            return "PUT", f"{MANIFESTS}/late", MANIFEST, {"content-type": MANIFEST_TYPE}
        wanted = {**proof, "x-redirect-uploads": "2"}
        begun = await self("POST", f"{UPLOADS}?digest={digest}", by="", headers=wanted)
        self.session_path = path_of(begun.headers["location"])
        if kind == "direct put":
            return "PUT", path_of(begun.headers["x-direct-upload-url"]), WEIGHTS, {}
        if kind == "final put":
            return "PUT", f"{self.session_path}?digest={digest}", WEIGHTS, {}
        part = {"content-range": f"0-{len(WEIGHTS) - 1}", "x-redirect-uploads": "1"}
        if kind == "repeated patch":
            assert (await self("PATCH", self.session_path, WEIGHTS, by="", headers={**proof, **part})).status == 202
        return "PATCH", self.session_path, WEIGHTS, part

    async def has_nothing(self, by: str = "alice") -> bool:
        """Whether nothing of what `send` sent is there: no blob, no tag, and no byte of the upload."""
        blob, tag = f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}", f"{MANIFESTS}/late"
        found = [(await self("HEAD", path, by=by)).status for path in (blob, tag)]
        if self.session_path:
            upload = await self("GET", self.session_path, by=by)
            assert (upload.status, upload.headers["range"]) == (204, "0-0")
        return found == [404, 404]


@pytest.fixture
async def late(tmp_path: Path) -> AsyncIterator[Late]:
    made = Late(tmp_path)
    await made.add("alice")
    factory = connection_factory(made.caller.app, made.state)
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()
    for left in tuple(made.state.connections):
        left.transport.abort()
    async with asyncio.timeout(20):
        await made.state.wait_until_idle()


async def nothing(late: Late) -> None:
    """What mostly happens."""


async def revoke_key(late: Late) -> None:
    alice = await account_of(late, "alice")
    for key in await late.identity.credentials.keys_of(alice):
        await late.identity.credentials.revoke_key(alice, key.id)


async def disable(late: Late) -> None:
    await late.identity.accounts.set_disabled("alice", True)


async def come_back(late: Late) -> None:
    """Alice again, with another key."""
    await late.identity.accounts.set_disabled("alice", False)
    _, late.keys["alice"] = await late.identity.key(await account_of(late, "alice"))


async def device_token(late: Late) -> tuple[Device, dict[str, str]]:
    """A device of alice's, and the Authorization of a token that it was given."""
    device = await late.identity.link(await account_of(late, "alice"), scopes=frozenset({Scope.PULL, Scope.PUSH}))
    principal = await late.identity.who(late.identity.stock())
    token = late.identity.tokens.issue(principal, [Grant("alice/tiny", frozenset({"pull", "push"}))])
    return device, {"authorization": f"Bearer {token.text.reveal()}"}


@pytest.mark.parametrize("kind", KINDS)
async def test_body_that_takes_its_time_is_taken(late: Late, kind: str) -> None:
    assert await late.send(kind, nothing) in (201, 202)


@pytest.mark.parametrize("meanwhile", [revoke_key, disable])
@pytest.mark.parametrize("kind", KINDS)
async def test_t062_body_under_way_when_its_credential_is_revoked_counts_for_nothing(
    late: Late, kind: str, meanwhile: Meanwhile
) -> None:
    assert await late.send(kind, meanwhile) == 401
    await come_back(late)
    assert await late.has_nothing()


@pytest.mark.parametrize("kind", KINDS)
async def test_t062_body_under_way_when_the_key_behind_its_token_is_revoked_counts_for_nothing(late: Late, kind: str) -> None:
    bearer = await token_for(late, "repository:alice/tiny:pull,push")
    assert await late.send(kind, revoke_key, bearer) == 401
    await come_back(late)
    assert await late.has_nothing()


@pytest.mark.parametrize("kind", KINDS)
async def test_t062_f19_token_that_merely_expires_while_a_body_is_under_way_is_good_for_it(late: Late, kind: str) -> None:
    bearer = await token_for(late, "repository:alice/tiny:pull,push")

    async def an_hour(late: Late) -> None:
        late.hub.clock.advance(3601)
        # The token itself is good for nothing new, and the address of a direct upload is not either.
        assert (await late("GET", f"{MANIFESTS}/latest", by="", headers=bearer)).status == 401

    assert await late.send(kind, an_hour, bearer) in (201, 202)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_revoked", [True, False], ids=["revoked", "pushes no more"])
async def test_t062_body_under_way_when_its_device_loses_the_right_counts_for_nothing(
    late: Late, kind: str, is_revoked: bool
) -> None:
    device, bearer = await device_token(late)

    async def lose(late: Late) -> None:
        alice, credentials = await account_of(late, "alice"), late.identity.credentials
        if is_revoked:
            await credentials.revoke_device(alice, device.id)
        else:
            await credentials.set_device_scopes(alice, device.id, frozenset({Scope.PULL}), network="")

    assert await late.send(kind, lose, bearer) == 401
    assert await late.has_nothing()


@pytest.mark.parametrize("kind", KINDS)
async def test_t062_f19_body_of_a_device_whose_token_expires_meanwhile_is_taken(late: Late, kind: str) -> None:
    _, bearer = await device_token(late)

    async def two_hours(late: Late) -> None:
        late.hub.clock.advance(7200)

    assert await late.send(kind, two_hours, bearer) in (201, 202)


@pytest.mark.parametrize("kind", KINDS)
async def test_t062_body_under_way_when_its_repository_is_closed_to_its_sender_counts_for_nothing(late: Late, kind: str) -> None:
    await late.add("bob")
    alice = with_key(await account_of(late, "alice"))
    assert (await late("POST", UPLOADS)).status == 202
    await late.hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    bearer = await token_for(late, "repository:alice/tiny:pull,push", by="bob")

    async def close(late: Late) -> None:
        await late.hub.repositories.set_collaborator(TINY, alice, "bob", None)

    assert await late.send(kind, close, bearer) == 403
    await late.hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    assert await late.has_nothing(by="bob")
