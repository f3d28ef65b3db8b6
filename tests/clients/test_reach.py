"""How far inside addresses lie, and who may point to whom."""

import pytest

from corral.clients.reach import GuardedResolver, Reach, reach_of_address
from corral.core.transfer_ports import RemoteRepository
from corral.wire.errors import CorralError
from fakes_remote_registry import Names, answer, wired


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("8.8.8.8", Reach.PUBLIC),
        ("2606:4700::1111", Reach.PUBLIC),
        ("10.0.0.1", Reach.PRIVATE),
        ("192.168.1.1", Reach.PRIVATE),
        ("100.64.0.1", Reach.PRIVATE),
        ("fd00::1", Reach.PRIVATE),
        ("240.0.0.1", Reach.PRIVATE),
        ("127.8.9.1", Reach.LOOPBACK),
        ("0.0.0.0", Reach.LOOPBACK),
        ("::", Reach.LOOPBACK),
        ("::1", Reach.LOOPBACK),
        ("::ffff:127.0.0.1", Reach.LOOPBACK),
        ("64:ff9b::7f00:1", Reach.LOOPBACK),
        ("2002:7f00:1::", Reach.LOOPBACK),
        ("::127.0.0.1", Reach.LOOPBACK),
        ("::ffff:0:127.0.0.1", Reach.LOOPBACK),
        ("::2", Reach.PRIVATE),
        ("::10.0.0.1", Reach.PRIVATE),
        ("64:ff9b:1::1", Reach.PRIVATE),
        ("fec0::1", Reach.PRIVATE),
        ("5f00::1", Reach.PRIVATE),
        ("169.254.169.254", Reach.ODD),
        ("168.63.129.16", Reach.ODD),
        ("::ffff:168.63.129.16", Reach.ODD),
        ("64:ff9b::c000:c0", Reach.ODD),
        ("fe80::1%eth0", Reach.ODD),
        ("224.0.0.1", Reach.ODD),
    ],
)
def test_address_lies_where_it_is(address: str, reach: Reach) -> None:
    assert reach_of_address(address) is reach


@pytest.mark.parametrize(
    ("addresses", "reach"),
    [
        (["10.0.0.1"], Reach.PRIVATE),
        (["127.0.0.1"], Reach.LOOPBACK),
        (["8.8.8.8"], Reach.PUBLIC),
        (["127.0.0.1", "8.8.8.8"], Reach.PUBLIC),
        (["169.254.1.1"], Reach.PUBLIC),
    ],
)
async def test_host_may_point_as_far_as_its_outermost_address(addresses: list[str], reach: Reach) -> None:
    assert await GuardedResolver(Names(reg_test=addresses)).reach_of("reg.test", 443) is reach


@pytest.mark.parametrize(
    ("own", "other", "is_reached"),
    [
        (Reach.PUBLIC, "8.8.8.8", True),
        (Reach.PUBLIC, "10.0.0.1", False),
        (Reach.PUBLIC, "127.0.0.1", False),
        (Reach.PUBLIC, "169.254.169.254", False),
        (Reach.PRIVATE, "10.0.0.1", True),
        (Reach.PRIVATE, "127.0.0.1", False),
        (Reach.PRIVATE, "169.254.169.254", False),
        (Reach.LOOPBACK, "127.0.0.1", True),
        (Reach.LOOPBACK, "10.0.0.1", True),
        (Reach.LOOPBACK, "169.254.169.254", False),
        (Reach.ANY, "169.254.169.254", True),
    ],
)
async def test_t093_names_and_literals_beyond_reach_are_refused(own: Reach, other: str, is_reached: bool) -> None:
    resolver = GuardedResolver(Names(evil_test=["8.8.8.8", other]))
    refusals = 0
    with resolver.within(own):
        try:
            await resolver.resolve("evil.test", 443)
        except CorralError:
            refusals += 1
        try:
            resolver.check_literal(other)
        except CorralError:
            refusals += 1
    assert refusals == (0 if is_reached else 2)


async def test_t093_connection_goes_by_the_address_and_not_by_the_name() -> None:
    async with wired(resolver=Names(evil_test=["169.254.169.254"])) as to:
        to.at.on = lambda _: answer(307, location="http://evil.test/latest/meta-data")
        with pytest.raises(CorralError, match="internal address"):
            await to.client.manifest(to.repository, "latest")


async def test_registry_that_a_person_named_may_be_anywhere() -> None:
    async with wired(resolver=Names(reg_test=["127.0.0.1"])) as to:
        to.at.on = lambda _: answer(404)
        port = to.at.url.rpartition(":")[2]
        assert await to.client.manifest(RemoteRepository(f"http://reg.test:{port}", "a/b"), "latest") is None


async def test_host_whose_name_is_none_is_refused() -> None:
    with pytest.raises(CorralError, match="whose name is none"):
        await GuardedResolver().check(f"{'a' * 64}.test", 443, is_proxied=False)
