"""What every AuditLog does."""

from datetime import timedelta

from corral.core.records import AuditEvent
from fakes import NOON
from identity_stores import Stores


def event(number: int = 0, **changes: object) -> AuditEvent:
    values = {
        "at": NOON + timedelta(seconds=number),
        "actor": "a1",
        "action": "key.create",
        "subject": f"k{number}",
        "network": "192.0.2.1",
        "note": "ci",
        **changes,
    }
    return AuditEvent(**values)  # type: ignore[arg-type]


async def test_events_come_back_newest_first_up_to_the_limit(stores: Stores) -> None:
    for number in range(3):
        await stores.audit.append(event(number))
    assert list(await stores.audit.recent()) == [event(2), event(1), event(0)]
    assert list(await stores.audit.recent(limit=1)) == [event(2)]


async def test_events_of_the_same_moment_keep_their_order(stores: Stores) -> None:
    await stores.audit.append(event(note="first"))
    await stores.audit.append(event(note="second"))
    assert [found.note for found in await stores.audit.recent()] == ["second", "first"]


async def test_t114_event_with_line_ends_and_escapes_stays_one_line(stores: Stores) -> None:
    hostile = "x\r\n2026-01-01 admin granted\x1b[2K\u202egnp\u2028\ud800"
    await stores.audit.append(event(actor=hostile, subject=hostile, network=hostile, note=hostile, action=hostile))
    (found,) = await stores.audit.recent()
    for text in (found.actor, found.subject, found.network, found.note, found.action):
        assert text == r"x\u000d\u000a2026-01-01 admin granted\u001b[2K\u202egnp\u2028\ud800"
