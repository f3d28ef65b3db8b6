"""corral.json and server.json: what is kept, and that a damaged file is never taken for an empty one."""

import json
import stat
from pathlib import Path

import pytest

from corral.core.ports import HubTerms
from corral.storage.hubstate import HubStateFile, is_cloud_off
from corral.wire.errors import CorralError

HUB = "http://localhost:11435"
STRONG = HubTerms(signature="corral-v1", public_url=HUB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".ollama" / "corral.json"


def test_state_without_a_file_is_empty(path: Path) -> None:
    state = HubStateFile(path)
    assert (state.hub(), state.terms(HUB)) == ("", None)
    assert not path.parent.exists()


def test_state_is_kept_for_the_next_process_and_private(path: Path) -> None:
    HubStateFile(path).choose_hub(HUB)
    HubStateFile(path).keep_terms(HUB, STRONG)
    again = HubStateFile(path)
    assert (again.hub(), again.terms(HUB)) == (HUB, STRONG)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_state_follows_what_another_process_writes(path: Path) -> None:
    mine, other = HubStateFile(path), HubStateFile(path)
    mine.choose_hub("https://one.example")
    assert other.hub() == "https://one.example"
    mine.choose_hub("https://two.example")
    mine.keep_terms(HUB, STRONG)
    assert (other.hub(), other.terms(HUB)) == ("https://two.example", STRONG)


def test_state_written_by_two_processes_keeps_what_both_wrote(path: Path) -> None:
    one, two = HubStateFile(path), HubStateFile(path)
    assert one.hub() == two.hub() == ""
    one.choose_hub(HUB)
    two.keep_terms(HUB, STRONG)
    one.keep_terms("https://b.example", HubTerms(signature="stock", public_url="https://b.example"))
    assert two.terms(HUB) == STRONG
    assert two.hub() == HUB


def test_state_keeps_members_of_later_versions(path: Path) -> None:
    HubStateFile(path).choose_hub(HUB)
    path.write_text(json.dumps({"theme": "dark", "hubs": {HUB: {"signature": "stock", "note": 1}}}))
    state = HubStateFile(path)
    state.keep_terms(HUB, STRONG)
    kept = json.loads(path.read_text())
    assert kept["theme"] == "dark"
    assert kept["hubs"][HUB] == {"signature": "corral-v1", "note": 1, "public_url": HUB}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"hub": 3}',
        '{"hubs": []}',
        '{"hubs": {"http://localhost:11435": []}}',
        '{"hubs": {"http://localhost:11435": {"signature": 1}}}',
        '{"hubs": {"http://localhost:11435": {"signature": "stock", "public_url": 1}}}',
        "[" * 5000,
    ],
)
def test_damaged_state_is_an_error_with_the_remedy_and_stays_as_it_is(path: Path, content: str) -> None:
    HubStateFile(path).choose_hub("x")
    path.write_text(content)
    state = HubStateFile(path)
    with pytest.raises(CorralError) as refused:
        assert (state.hub(), state.terms(HUB)) is None
    assert refused.value.code == "invalid"
    assert "corral signin" in refused.value.message
    assert path.read_text() == content


def test_state_that_others_may_write_is_refused(path: Path) -> None:
    HubStateFile(path).choose_hub(HUB)
    path.chmod(0o666)
    with pytest.raises(CorralError, match="chmod 600"):
        HubStateFile(path).hub()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, False),
        ("{}", False),
        ('{"disable_ollama_cloud": false}', False),
        ('{"disable_ollama_cloud": true}', True),
        ('{"disable_ollama_cloud": "yes"}', False),
    ],
)
def test_cloud_switch_is_read_from_the_config(tmp_path: Path, content: str | None, expected: bool) -> None:
    path = tmp_path / "server.json"
    if content is not None:
        path.write_text(content)
    assert is_cloud_off(path) is expected


def test_cloud_switch_in_a_damaged_config_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    path.write_text("{")
    with pytest.raises(CorralError, match=r"server\.json"):
        is_cloud_off(path)
