"""Requests written down for debugging: what is in the files, who may read them, and how many there may be."""

import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest

from asgi_client import Caller
from corral.core.policy import PUBLIC
from corral.edges.asgi import App, AppOptions, body_of, endpoint, json_response
from corral.edges.request_log import noted
from corral.storage import requestlog
from corral.storage.requestlog import RequestLog
from fakes import NOON


def files(log: RequestLog) -> list[Path]:
    return sorted(log.directory.iterdir())


def test_request_is_kept_as_it_came_and_can_be_asked_again(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    log.note("/api/chat", "localhost:11434", "application/json", b'{"x": 1}', now=NOON)
    body, script = files(log)
    stamp = f"{NOON:%Y%m%dT%H%M%S.%f}Z-000001_api_chat"
    assert (body.name, script.name) == (f"{stamp}_body.json", f"{stamp}_request.sh")
    assert body.read_bytes() == b'{"x": 1}'
    assert "--url http://localhost:11434/api/chat --header 'Content-Type: application/json'" in script.read_text()
    assert [path.stat().st_mode & 0o777 for path in (log.directory, body, script)] == [0o700, 0o600, 0o600]


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_t096_callers_header_is_no_command_in_the_script(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    log.note("/api/chat", "h$(touch pwned)", "a'; touch pwned; '", b"{}", now=NOON)
    command, nothing = [str(shutil.which("sh")), str(files(log)[1])], {"PATH": "/nonexistent"}
    checked = subprocess.run(command, cwd=tmp_path, env=nothing, capture_output=True, check=False)
    assert checked.returncode != 0
    assert not (tmp_path / "pwned").exists()


def test_files_end_before_the_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Patched because a gigabyte is too much for a test.
    monkeypatch.setattr(requestlog, "_MAX_BYTES", 1000)
    monkeypatch.setattr(requestlog, "_LEAST_BYTES", 0)
    log = RequestLog(tmp_path)
    with caplog.at_level(logging.WARNING):
        for size in (600, 395, 200, 1):
            log.note("/api/chat", "h", "t", b"x" * size, now=NOON)
    assert [path.stat().st_size for path in files(log) if path.name.endswith("body.json")] == [600, 395]
    assert "there are enough" in caplog.text


def test_t095_small_requests_are_not_written_down_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requestlog, "_MAX_BYTES", 100_000)
    log = RequestLog(tmp_path)
    for _ in range(100):
        log.note("/api/chat", "h", "t", b"{}", now=NOON)
    assert len(files(log)) < 2 * 100_000 / 8000


def test_disk_that_takes_nothing_is_only_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(tmp_path)
    log.directory.rmdir()
    with caplog.at_level(logging.WARNING):
        log.note("/api/chat", "h", "t", b"x", now=NOON)
    assert "could not be written" in caplog.text


async def test_t113_only_prompts_are_written_down_and_no_credential_with_them(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)

    async def echo(request: object) -> object:
        return json_response({"size": len(body_of(request))})  # type: ignore[arg-type]

    rows = [endpoint("POST", path, echo, PUBLIC) for path in ("/v1/messages", "/api/show")]  # type: ignore[arg-type]
    app = App([noted(row, log, lambda: NOON) for row in rows], AppOptions())
    for path in ("/v1/messages", "/api/show"):
        headers = {"authorization": "Bearer crlk_secret", "x-api-key": "crlk_secret", "cookie": "crlk_secret"}
        answer = await Caller(app).request("POST", path, headers=headers, body=json.dumps({"model": "m"}).encode())
        assert answer.json() == {"size": 14}
    assert len(files(log)) == 2
    assert "v1_messages" in files(log)[0].name
    assert not [path for path in files(log) if b"crlk_secret" in path.read_bytes()]
