"""The keys of upstream servers: kept for their owner alone, in force at once, and of no use to anybody when they are damaged."""

import logging
import stat
from pathlib import Path

import pytest

from corral.storage.upstreamkeys import UpstreamKeys
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret

NEAR, FAR = "http://10.0.0.7:8000", "https://far.example"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return home / "upstream-keys.json"


def test_key_counts_at_once_for_whoever_reads_them(path: Path) -> None:
    running, command = UpstreamKeys(path), UpstreamKeys(path)
    assert running.of(NEAR) is None
    command.put(NEAR, Secret("sk-one"))
    command.put(FAR, Secret("sk-far"))
    assert (running.of(NEAR), running.of(FAR), running.of("http://10.0.0.8")) == (Secret("sk-one"), Secret("sk-far"), None)
    command.put(NEAR, Secret("sk-two"))
    assert running.of(NEAR) == Secret("sk-two")
    command.keep_only([FAR, "http://10.0.0.8"])
    assert (running.of(NEAR), running.of(FAR)) == (None, Secret("sk-far"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_forgetting_what_nobody_keeps_writes_nothing(path: Path) -> None:
    UpstreamKeys(path).keep_only([])
    assert not path.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\xff", '{"a": {"b": "c"}}'])
def test_damaged_file_is_no_key_and_tells_callers_no_path(path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = UpstreamKeys(path)
    keys.put(NEAR, Secret("sk-one"))
    assert keys.of(NEAR) == Secret("sk-one")
    path.write_text(content, encoding="latin-1")
    for _ in range(2):
        with caplog.at_level(logging.WARNING), pytest.raises(CorralError) as caught:
            keys.of(NEAR)
        assert (caught.value.code, str(path) in caught.value.message) == ("upstream_failed", False)
        assert str(path) in caplog.text
    with pytest.raises(CorralError, match="damaged"):
        keys.put(NEAR, Secret("sk-two"))


def test_file_that_others_can_read_is_refused(path: Path) -> None:
    UpstreamKeys(path).put(NEAR, Secret("sk-one"))
    path.chmod(0o644)
    with pytest.raises(CorralError) as caught:
        UpstreamKeys(path).of(NEAR)
    assert caught.value.code == "upstream_failed"
