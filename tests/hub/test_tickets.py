"""Addresses that work without an Authorization header: for what, for how long, and whose rights they carry."""

from dataclasses import replace
from itertools import pairwise
from time import perf_counter

import pytest

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, ApiKey, BrowserSession, Device, Principal, Proof, Scope, Visitor
from corral.core.registry import Right, Visibility
from corral.hub.tickets import MAX_LIFE, MIN_LIFE, TicketKind, Tickets
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes_registry import digest_of
from identity_hub import LAPTOP, error_of
from registry_hub import TINY, RegistryHub, chunks

SECRET, OLD_SECRET = b"s" * 32, b"o" * 32
WEIGHTS = digest_of(b"weights")


class TicketHub(RegistryHub):
    """A registry with credentials that tickets are made for."""

    def __init__(self) -> None:
        super().__init__()
        self.tickets = Tickets(SECRET, credentials=self.credentials, clock=self.clock)

    async def key(self, account: Account, scopes: frozenset[Scope] = ALL_SCOPES) -> Principal:
        """An API key that the store knows."""
        key = ApiKey(
            id=f"key-{account.name}", account_id=account.id, name="ci", prefix="", scopes=scopes, created_at=self.clock.now()
        )
        await self.credentials.add_api_key(key, hmac=b"", pepper_id="")
        return Principal(account=account, proof=Proof.API_KEY, credential_id=key.id, scopes=scopes)

    async def device(self, account: Account) -> Principal:
        """A device that the store knows, with a registry token."""
        device = Device(
            id="d1", account_id=account.id, name="laptop", key=LAPTOP.public, scopes=ALL_SCOPES, created_at=self.clock.now()
        )
        await self.credentials.add_device(device)
        grants = {"alice/tiny": frozenset({"pull", "push"})}
        return Principal(
            account=account,
            proof=Proof.REGISTRY_TOKEN,
            credential_id=device.id,
            scopes=ALL_SCOPES,
            device=device,
            grants=grants,
        )

    async def read(self, ticket: str, digest: Digest = WEIGHTS, name: RepositoryName = TINY) -> int:
        """How long the blob is that the ticket gives."""
        return (await self.tickets.blob(ticket, self.registry, name, digest)).size_bytes

    async def refusal(self, ticket: str, digest: Digest = WEIGHTS, name: RepositoryName = TINY) -> str:
        """Why the ticket gives nothing."""
        return (await error_of(self.read(ticket, digest, name))).code


@pytest.fixture
def hub() -> TicketHub:
    return TicketHub()


@pytest.fixture
async def alice(hub: TicketHub) -> Principal:
    """Alice, with an API key and a blob."""
    principal = await hub.key((await hub.add("alice")).account)
    await hub.push_blob(TINY, principal, b"weights")
    return principal


def a_ticket(hub: TicketHub, caller: Principal | Visitor | None, *, size_bytes: int = 7) -> str:
    return hub.tickets.issue(TicketKind.BLOB, TINY, WEIGHTS, caller, size_bytes=size_bytes)


async def test_t039_ticket_gives_its_blob_without_any_header(hub: TicketHub, alice: Principal) -> None:
    ticket = a_ticket(hub, alice)
    assert await hub.read(ticket) == 7
    assert await hub.read(ticket, name=RepositoryName("Alice", "TINY")) == 7
    assert set(ticket) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
    assert alice.account.name not in ticket


async def test_t039_f20_ticket_is_good_for_nothing_else(hub: TicketHub, alice: Principal) -> None:
    other = await hub.push_blob(TINY, alice, b"other")
    await hub.push_blob(RepositoryName("alice", "second"), alice, b"weights")
    ticket = a_ticket(hub, alice)
    assert await hub.refusal(ticket, other) == "forbidden"
    assert await hub.refusal(ticket, name=RepositoryName("alice", "second")) == "forbidden"
    error = await error_of(hub.tickets.redeem(ticket, TicketKind.UPLOAD, TINY, WEIGHTS))
    assert error.code == "forbidden"


async def test_t039_altered_ticket_is_refused(hub: TicketHub, alice: Principal) -> None:
    ticket = a_ticket(hub, alice)
    for position, character in enumerate(ticket):
        altered = ticket[:position] + ("A" if character != "A" else "B") + ticket[position + 1 :]
        assert await hub.refusal(altered) == "forbidden"


@pytest.mark.parametrize(
    "junk", ["", ".", "..", "a.b", "a.b.c.d", "a.!.b", "\ud800.a.b", "ü.ü.ü", "a" * 5000, "a.b.c\n", "=.=.="]
)
async def test_junk_is_no_ticket(hub: TicketHub, junk: str) -> None:
    assert await hub.refusal(junk) == "forbidden"


async def test_ticket_of_other_secrets_is_refused_and_of_a_previous_one_taken(hub: TicketHub, alice: Principal) -> None:
    old = Tickets(OLD_SECRET, credentials=hub.credentials, clock=hub.clock)
    ticket = old.issue(TicketKind.BLOB, TINY, WEIGHTS, alice, size_bytes=7)
    assert await hub.refusal(ticket) == "forbidden"
    # Under the id of the current secret as well.
    current_id = a_ticket(hub, alice).split(".")[0]
    assert await hub.refusal(".".join([current_id, *ticket.split(".")[1:]])) == "forbidden"
    rotated = Tickets(SECRET, credentials=hub.credentials, clock=hub.clock, previous=[OLD_SECRET])
    assert (await rotated.blob(ticket, hub.registry, TINY, WEIGHTS)).size_bytes == 7


async def test_t039_ticket_lives_as_long_as_its_blob_takes_and_a_day_at_most(hub: TicketHub, alice: Principal) -> None:
    sizes = [0, 1 << 30, 4 << 30, 1 << 50]
    tickets = [a_ticket(hub, alice, size_bytes=size) for size in sizes]
    lives = []
    for ticket in tickets:
        start = hub.clock.now()
        while True:
            try:
                await hub.read(ticket)
            except CorralError:
                break
            hub.clock.advance(600)
        lives.append((hub.clock.now() - start).total_seconds())
        hub.clock.set_back(lives[-1])
    assert lives[0] == MIN_LIFE.total_seconds()
    assert lives[-1] == MAX_LIFE.total_seconds()
    assert all(one <= next_one for one, next_one in pairwise(lives))


async def test_f20_ticket_dies_with_the_key_it_was_made_for(hub: TicketHub, alice: Principal) -> None:
    ticket = a_ticket(hub, alice)
    await hub.credentials.revoke_api_key(alice.account.id, alice.credential_id, now=hub.clock.now())
    assert await hub.refusal(ticket) == "forbidden"


async def test_f20_ticket_dies_with_the_device_it_was_made_for(hub: TicketHub, alice: Principal) -> None:
    ticket = a_ticket(hub, await hub.device(alice.account))
    assert await hub.read(ticket) == 7
    await hub.credentials.revoke_device(alice.account.id, "d1", now=hub.clock.now())
    assert await hub.refusal(ticket) == "forbidden"
    # The same key as another device is another credential.
    await hub.credentials.add_device(
        Device(id="d2", account_id=alice.account.id, name="x", key=LAPTOP.public, scopes=ALL_SCOPES, created_at=hub.clock.now())
    )
    assert await hub.refusal(ticket) == "forbidden"


async def test_t119_ticket_dies_with_its_account(hub: TicketHub, alice: Principal) -> None:
    root = await hub.add("root", is_admin=True)
    ticket = a_ticket(hub, alice)
    await hub.accounts.set_disabled(alice.account.id, hub.clock.now())
    assert await hub.refusal(ticket) == "forbidden"
    await hub.accounts.set_disabled(alice.account.id, None)
    assert await hub.read(ticket) == 7
    await hub.accounts.remove(alice.account.id, now=hub.clock.now())
    assert await hub.refusal(ticket) == "forbidden"
    assert root.account.is_admin


async def test_t039_right_that_is_taken_away_is_gone_at_the_next_range(hub: TicketHub, alice: Principal) -> None:
    bob = await hub.key((await hub.add("bob")).account)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PULL)
    ticket = a_ticket(hub, bob)
    assert await hub.read(ticket) == 7
    await hub.repositories.set_collaborator(TINY, alice, "bob", None)
    assert await hub.refusal(ticket) == "forbidden"


async def test_f20_ticket_of_a_blob_that_was_deleted_gives_nothing(hub: TicketHub, alice: Principal) -> None:
    ticket = a_ticket(hub, alice)
    await hub.registry.remove_blob(TINY, WEIGHTS, alice)
    assert await hub.refusal(ticket) == "blob_unknown"


@pytest.mark.parametrize("visitor", [None, Visitor(), Visitor(fingerprint="SHA256:x", key=LAPTOP.public)])
async def test_ticket_of_a_stranger_is_good_while_the_repository_is_public(
    hub: TicketHub, alice: Principal, visitor: Visitor | None
) -> None:
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    ticket = a_ticket(hub, visitor)
    assert await hub.read(ticket) == 7
    await hub.repositories.set_visibility(TINY, alice, Visibility.PRIVATE)
    assert await hub.refusal(ticket) == "forbidden"


async def test_ticket_of_an_upload_writes_to_that_upload_as_its_account(hub: TicketHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    ticket = hub.tickets.issue(TicketKind.UPLOAD, TINY, upload.id, alice, size_bytes=3)
    caller = await hub.tickets.redeem(ticket, TicketKind.UPLOAD, TINY, upload.id)
    await hub.registry.append(upload.id, TINY, caller, chunks(b"abc"), length=3)
    assert await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")) == digest_of(b"abc")
    assert (await error_of(hub.tickets.redeem(ticket, TicketKind.UPLOAD, TINY, "0" * 32))).code == "forbidden"
    assert (await error_of(hub.registry.append(upload.id, TINY, caller, chunks(b"d")))).code == "blob_upload_unknown"


async def test_ticket_has_the_scopes_of_its_credential_and_no_more(hub: TicketHub, alice: Principal) -> None:
    bob = await hub.key((await hub.add("bob")).account, frozenset({Scope.PULL}))
    ticket = hub.tickets.issue(TicketKind.UPLOAD, TINY, "u", bob, size_bytes=0)
    caller = await hub.tickets.redeem(ticket, TicketKind.UPLOAD, TINY, "u")
    assert isinstance(caller, Principal)
    assert caller.scopes == {Scope.PULL}


async def test_browser_gets_no_ticket(hub: TicketHub, alice: Principal) -> None:
    now = hub.clock.now()
    session = BrowserSession(
        id="s", account_id="a", csrf="", created_at=now, authenticated_at=now, last_used_at=now, expires_at=now
    )
    with pytest.raises(Exception, match="browser"):
        a_ticket(hub, replace(alice, proof=Proof.SESSION, session=session))


async def test_t039_a_thousand_uses_are_quick(hub: TicketHub, alice: Principal) -> None:
    ticket = a_ticket(hub, alice)
    began = perf_counter()
    for _ in range(1000):
        await hub.read(ticket)
    # 30 ms here; generous, since other tests run beside this one.
    assert perf_counter() - began < 1
