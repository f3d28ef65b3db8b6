"""Tables of keys and devices: in full where there is room or a pipe, shortened on a narrow terminal."""

import fcntl
import os
import struct
import sys
import termios
from datetime import UTC, datetime
from pathlib import Path

import pytest

from corral.cli.commands_keys import devices_table, keys_table
from corral.cli.render import terminal_width

NOW = datetime(2027, 1, 1, tzinfo=UTC)
ALL = ["inference", "keys", "models:pull", "models:push"]
DEVICE = {
    "id": "d" + "0" * 24,
    "name": "finch",
    "fingerprint": "SHA256:lbmsoA0yIEcEiVDRnMWuzm+nV+3ZEEpVIURqFoeSspg",
    "scopes": ALL,
    "last_used_at": "2026-12-31T23:58:00Z",
    "last_network": "192.0.2.7",
    "current": True,
}
KEY = {"id": "9fK2", "name": "ci", "prefix": "crlk_9fK2", "scopes": ["keys", "models:push", "new"], "last_used_at": None}


@pytest.mark.parametrize("width", [0, 200])
def test_devices_with_room_are_listed_in_full(width: int) -> None:
    row = devices_table([DEVICE], NOW, width=width).splitlines()[1]
    assert DEVICE["fingerprint"] in row
    assert "inference, models:pull, models:push, keys" in row


def test_devices_on_a_narrow_terminal_are_listed_as_on_the_page() -> None:
    row = devices_table([DEVICE], NOW, width=120).splitlines()[1]
    assert row.split("    ")[1:4] == ["finch (this one)", "SHA256:lbms…Sspg", "inference, models:pull, models:push, keys"]
    full = devices_table([DEVICE], NOW)
    assert devices_table([DEVICE], NOW, width=len(full.splitlines()[1].rstrip())) == full


def test_scopes_of_keys_are_listed_in_one_order_those_of_a_newer_hub_last() -> None:
    assert "models:push, keys, new    " in keys_table([KEY], NOW, everything=False)
    assert "nothing" in keys_table([{**KEY, "scopes": []}], NOW, everything=False)


def test_width_is_that_of_the_terminal_and_0_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 97, 0, 0))
        monkeypatch.setattr(sys, "stdout", terminal)  # where a command writes to; there is no way to hand it another one
        assert terminal_width() == 97
    with Path(os.devnull).open("w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert terminal_width() == 0
