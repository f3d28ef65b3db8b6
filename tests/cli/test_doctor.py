"""`corral doctor` as a command, against scripted servers: what it sends, to whom, what it prints, and that it leaves no trace."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from corral.cli.app import run
from corral.cli.commands_doctor import report
from corral.cli.doctor_findings import IDENTITY, Finding, findings
from corral.cli.doctor_gather import in_time, look
from corral.main import checkup
from corral.main.shared import SystemEntropy
from corral.settings import Settings
from corral.storage.home import FileDeviceKeys
from corral.wire.apikeys import ENTROPY_BYTES, make_api_key
from corral.wire.errors import CorralError
from corral.wire.signing import connect_url
from corral.wire.strong import TAG
from fakes_cli import FakeServer, fake_server

NOBODY = "127.0.0.1:9"
API_KEY = make_api_key(bytes(range(ENTROPY_BYTES)))
SECRET = API_KEY.text.reveal()
UNAUTHORIZED = {"error": "unauthorized"}
#: Nobody is there; what is not asked for stays away.
EMPTY = {"OLLAMA_HOST": NOBODY, "CORRAL_HUB": f"http://{NOBODY}"}


@contextmanager
def corral_hub(**answers: tuple[int, Any]) -> Iterator[FakeServer]:
    """A hub of the strong signature. answers: `me`, `devices`, `keys`, `generate`; by default, it knows nobody."""
    with fake_server({}) as server:
        discovery = {"corral": "1", "public_url": server.url, "signatures": [TAG, "stock"]}
        server.answers["GET /.well-known/corral"] = (200, discovery)
        paths = {"me": "POST /api/me", "devices": "GET /api/user/keys", "keys": "GET /api/keys", "generate": "POST /api/generate"}
        for name, path in paths.items():
            server.answers[path] = answers.get(name, (401, UNAUTHORIZED))
        yield server


def doctor(environ: dict[str, str], capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """(exit status, check -> row) of `corral doctor auth --json`."""
    status = run(["doctor", "auth", "--json", *words], environ)
    out, err = capsys.readouterr()
    assert err == ""
    assert SECRET not in out
    return status, {row["check"]: row for row in json.loads(out)}


def with_key(home: Path) -> str:
    """A home with a device key; its fingerprint."""
    return FileDeviceKeys(home / ".ollama", SystemEntropy()).load_or_create().public.fingerprint


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: path -> mode, time of change, content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


# ── What it leaves behind ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("switch", ["", "OLLAMA_AUTH"])
def test_empty_home_is_left_empty(switch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with corral_hub() as hub, fake_server({"GET /api/version": (401, UNAUTHORIZED)}) as local:
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": local.host, "CORRAL_HUB": hub.url, "OLLAMA_API_KEY": SECRET}
        status, rows = doctor({**environ, **({switch: "1"} if switch else {})}, capsys)
    assert status == 1
    assert rows["key file"]["status"] == "problem"
    assert list(tmp_path.iterdir()) == []


def test_home_in_use_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    (tmp_path / ".ollama/id_ed25519.pub").unlink()
    before = state_of(tmp_path)
    with corral_hub(me=(200, {"name": "alice"}), devices=(200, [[]])) as hub:
        assert doctor({"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": hub.url}, capsys)[0] == 0
    assert state_of(tmp_path) == before


def test_damaged_memory_of_hubs_is_told_once_and_no_hub_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    (tmp_path / ".ollama/corral.json").write_text("{")
    (tmp_path / ".ollama/corral.json").chmod(0o600)
    status, rows = doctor({"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY}, capsys)
    assert status == 1
    assert [name for name, row in rows.items() if row["status"] == "problem"] == ["corral.json"]
    assert rows["corral.json"]["fix"].startswith("repair it, or remove it")


# ── Where credentials go ─────────────────────────────────────────────────────────────────────────────────────────────


def test_t090_api_key_of_a_corral_hub_is_not_shown_to_another_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/me": (401, UNAUTHORIZED)}) as stranger:
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": stranger.url, "OLLAMA_API_KEY": SECRET}
        status, rows = doctor(environ, capsys)
        assert status == 1
        assert rows["OLLAMA_API_KEY"]["fix"] == "set CORRAL_HUB to the hub that made it"
        assert not [seen for seen in stranger.seen if "authorization" in seen.headers]


def test_t053_text_that_is_no_api_key_is_neither_sent_nor_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with corral_hub() as hub:
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": hub.url, "OLLAMA_API_KEY": "hunter2-hunter2"}
        assert run(["doctor", "auth"], environ) == 1
        said = capsys.readouterr().out
        assert "set, but it is no API key of a Corral hub; those begin with crlk_" in said
        assert "hunter2" not in said
        assert not [seen for seen in hub.seen if "authorization" in seen.headers]


def test_t017_nothing_is_asked_over_plain_http_of_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    environ = {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": "http://192.0.2.1", "OLLAMA_API_KEY": SECRET}
    status, rows = doctor(environ, capsys)
    assert status == 1
    assert rows["hub"]["fix"] == "give its https address"
    assert rows["OLLAMA_API_KEY"]["detail"] == f"{API_KEY.prefix}…  not tried"


def test_switched_off_cloud_asks_no_hub_that_nobody_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    status, rows = doctor({"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "OLLAMA_NO_CLOUD": "1"}, capsys)
    assert (status, rows["hub"]["status"], rows["relay"]["status"]) == (0, "skipped", "skipped")


def test_key_that_opens_the_local_server_is_not_shown_to_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with corral_hub() as hub, fake_server({"GET /api/status": (200, {})}) as local:

        def version() -> tuple[int, Any]:
            return (
                (200, {"version": "0.34.0", "corral": "9"}) if "authorization" in local.seen[-1].headers else (401, UNAUTHORIZED)
            )

        local.vary["GET /api/version"] = version
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": local.host, "CORRAL_HUB": hub.url, "OLLAMA_API_KEY": SECRET}
        _, rows = doctor(environ, capsys)
        assert rows["OLLAMA_API_KEY"]["detail"] == f"{API_KEY.prefix}…  taken by {local.url}"
        assert not [seen for seen in hub.seen if "authorization" in seen.headers]


@pytest.mark.parametrize(("host", "header"), [("127.0.0.1", "authorization"), ("0.0.0.0", "signature-input")])
def test_secured_server_is_signed_for_as_by_every_command(
    host: str, header: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_key(tmp_path)
    with corral_hub() as hub, fake_server({"GET /api/version": (401, UNAUTHORIZED)}) as local:
        # To the command, the second address is one that others can listen on the way to.
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": local.host.replace("127.0.0.1", host), "CORRAL_HUB": hub.url}
        doctor({**environ, "OLLAMA_AUTH": "1", "OLLAMA_API_KEY": SECRET}, capsys)
        first, second = local.seen
        assert (header in first.headers, header in second.headers) == (False, True)
        assert not second.headers.get("authorization", "").startswith("Bearer")


def test_local_server_that_asks_for_nothing_is_shown_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, tuple[int, Any]] = {"GET /api/version": (200, {"version": "0.34.0", "corral": "9"})}
    with corral_hub() as hub, fake_server(answers) as local:
        doctor({"HOME": str(tmp_path), "OLLAMA_HOST": local.host, "CORRAL_HUB": hub.url, "OLLAMA_API_KEY": SECRET}, capsys)
        assert local.seen
        assert not [seen for seen in local.seen if "authorization" in seen.headers]


def test_address_that_stands_for_all_of_this_machine_is_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with corral_hub() as hub, fake_server({"GET /api/version": (200, {"version": "0.34.0", "corral": "9"})}) as local:
        host = local.host.replace("127.0.0.1", "0.0.0.0")
        run(
            ["doctor", "--json"],
            {"HOME": str(tmp_path), "OLLAMA_HOST": host, "CORRAL_HUB": hub.url, "CORRAL_LLAMA_SERVER": "/none"},
        )
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["local server"]["detail"].startswith(f"{local.url}  Corral 9, ")
    assert rows["engine"]["status"] == "problem"


@pytest.mark.parametrize("answer", [(501, "no"), (404, UNAUTHORIZED), (200, [b"<html>"]), (200, [[]])], ids=str)
def test_web_server_that_is_no_hub_is_told_and_gets_no_signature(
    answer: tuple[int, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_key(tmp_path)
    local_answers: dict[str, tuple[int, Any]] = {
        "GET /api/version": (200, {"version": "0.34.0", "corral": "9"}),
        "GET /api/status": (200, {"cloud": {"disabled": False, "source": "none"}, "hub": "https://hub.test"}),
    }
    with fake_server({"POST /api/me": answer}) as web, fake_server(local_answers) as local:
        _, rows = doctor({"HOME": str(tmp_path), "OLLAMA_HOST": local.host, "CORRAL_HUB": web.url}, capsys)
        assert not [seen for seen in web.seen if "authorization" in seen.headers or "signature" in seen.headers]
    assert {name: row["fix"] for name, row in rows.items() if row["status"] == "problem"} == {"hub": "check CORRAL_HUB"}
    assert rows["hub"]["detail"].startswith(f"{web.url} is not a hub: ")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_local_server_of_this_user_is_not_asked_what_would_make_the_missing_key(
    is_damaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_key(tmp_path)
    path = tmp_path / ".ollama/id_ed25519"
    if is_damaged:
        path.chmod(0o644)
    else:
        path.unlink()
    monkeypatch.setattr(checkup, "knows_hub", lambda settings, hub: True)
    with corral_hub() as hub, fake_server({"GET /api/version": (200, {"version": "0.34.0", "corral": "9"})}) as local:
        status, rows = doctor({"HOME": str(tmp_path), "OLLAMA_HOST": local.host, "CORRAL_HUB": hub.url}, capsys)
        assert "/api/me" not in [seen.path for seen in local.seen]
    assert (status, [name for name, row in rows.items() if row["status"] == "problem"]) == (1, ["key file"])
    assert rows["relay"]["detail"] == "not asked: there is no usable key"


# ── What the hub tells ───────────────────────────────────────────────────────────────────────────────────────────────


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": API_KEY.public_id, "scopes": ["inference"], "expires_at": None, "revoked_at": None, **changes}


@pytest.mark.parametrize(
    ("listed", "detail"),
    [
        ([entry(revoked_at="2026-01-02T00:00:00Z")], "revoked on 2026-01-02"),
        ([entry(expires_at="2026-01-03T00:00:00Z")], "expired on 2026-01-03"),
        ([entry(id="another")], "refused by HUB: no key of alice"),
        ("nonsense", "refused by HUB: no key of alice"),
    ],
)
def test_refused_key_is_explained_by_the_list_that_this_device_sees(
    listed: Any, detail: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_key(tmp_path)
    with corral_hub(devices=(200, [[]]), keys=(200, [listed])) as hub:

        def me() -> tuple[int, Any]:
            is_key = hub.seen[-1].headers.get("authorization", "").startswith("Bearer ")
            return (401, UNAUTHORIZED) if is_key else (200, {"name": "alice"})

        hub.vary["POST /api/me"] = me
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": hub.url, "OLLAMA_API_KEY": SECRET}
        status, rows = doctor(environ, capsys)
        assert status == 1
        assert rows["OLLAMA_API_KEY"]["detail"] == f"{API_KEY.prefix}…  {detail.replace('HUB', hub.host)}"


@pytest.mark.parametrize(("generate", "is_fine"), [((403, UNAUTHORIZED), False), ((400, UNAUTHORIZED), True)])
def test_scope_of_a_device_that_is_told_no_list_is_found_out_by_a_request_for_nothing(
    generate: tuple[int, Any], is_fine: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_key(tmp_path)
    with corral_hub(me=(200, {"name": "alice"}), devices=(403, UNAUTHORIZED), generate=generate) as hub:
        status, rows = doctor({"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": hub.url}, capsys)
    assert (status == 0) == (rows["device"]["status"] == "ok") == is_fine


def test_another_users_key_is_recognised_by_the_link_that_the_local_server_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_key(tmp_path / "mine")
    other = FileDeviceKeys(tmp_path / "other/.ollama", SystemEntropy()).load_or_create().public
    me = (200, {"name": "alice", "device": {"id": "d1", "name": "mine"}})
    with corral_hub(me=me, devices=(200, [[]])) as hub, fake_server({}) as local:
        local.answers |= {
            "GET /api/version": (200, {"version": "0.34.0", "corral": "9"}),
            "GET /api/status": (200, {"cloud": {"disabled": False, "source": "none"}, "hub": hub.url}),
            "POST /api/me": (401, {**UNAUTHORIZED, "signin_url": connect_url(hub.url, "box", other)}),
        }
        status, rows = doctor({"HOME": str(tmp_path / "mine"), "OLLAMA_HOST": local.host, "CORRAL_HUB": hub.url}, capsys)
    assert status == 1
    assert rows["device"]["status"] == "ok"
    assert f"signs with another key {other.fingerprint}, which is not connected" in rows["relay"]["detail"]


# ── Clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class WrongClock:
    """A machine's clock that is so far behind."""

    def __init__(self, behind_s: float) -> None:
        self._behind = timedelta(seconds=behind_s)

    def now(self) -> datetime:
        return datetime.now(UTC) - self._behind

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()


async def rows_of(home: Path, hub: FakeServer, *, behind_s: float) -> dict[str, Finding]:
    seen = await look(settings(home, OLLAMA_HOST=NOBODY), hub.url, clock=WrongClock(behind_s), is_identity_only=True)
    return {finding.check: finding for finding in findings(seen, checks=IDENTITY)}


@pytest.mark.parametrize(("behind_s", "status"), [(-412, "problem"), (100, "ok"), (412, "problem")])
async def test_hub_of_another_time_is_told_of_and_signed_for_by_its_own_clock(behind_s: int, status: str, tmp_path: Path) -> None:
    with_key(tmp_path)
    with corral_hub(me=(200, {"name": "alice"}), devices=(200, [[]])) as hub:
        rows = await rows_of(tmp_path, hub, behind_s=behind_s)
        inputs = [seen.headers["signature-input"] for seen in hub.seen if "signature-input" in seen.headers]
    assert rows["clock"].status == status
    # `Date` has whole seconds.
    assert int(rows["clock"].detail.partition(" ")[0]) == pytest.approx(abs(behind_s), abs=5)
    assert rows["device"].status == "ok"
    created = int(inputs[0].partition("created=")[2].partition(";")[0])
    assert created == pytest.approx(datetime.now(UTC).timestamp(), abs=60)


async def test_t018_stock_hub_that_claims_another_time_gets_no_signature_of_that_time(tmp_path: Path) -> None:
    with_key(tmp_path)
    with fake_server({"POST /api/me": (200, {"name": "alice"})}) as hub:
        rows = await rows_of(tmp_path, hub, behind_s=412)
        assert not [seen for seen in hub.seen if "authorization" in seen.headers]
    assert (rows["clock"].status, rows["device"].status) == ("problem", "skipped")


# ── What it prints ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_report_has_a_row_for_each_check_and_below_a_problem_what_to_do() -> None:
    rows = [
        Finding(check="hub", status="ok", detail="reachable"),
        Finding(check="OLLAMA_API_KEY", status="problem", detail="refused", fix="take another"),
        Finding(check="relay", status="skipped", detail="not asked"),
    ]
    assert report(rows) == (
        "hub            reachable\nOLLAMA_API_KEY refused  ✗\n  → take another\nrelay          not asked\n1 problem.\n"
    )
    assert report(rows[:1]) == "hub reachable\nNo problems.\n"
    assert report(rows[1:2] * 2).endswith("\n2 problems.\n")


def test_t114_what_servers_say_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    nasty = "al\x1b[2Jice\r\n\x9b1m" + "x" * 5000
    answers: dict[str, tuple[int, Any]] = {"GET /api/version": (200, {"version": nasty, "corral": nasty})}
    with corral_hub(me=(200, {"name": nasty}), devices=(200, [[]])) as hub, fake_server(answers) as local:
        run(["doctor", "auth"], {"HOME": str(tmp_path), "OLLAMA_HOST": local.host, "CORRAL_HUB": hub.url})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "\x9b" not in out
    assert max(map(len, out.splitlines())) < 500


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "x",
        None,
        7,
        {"corral": 1, "version": []},
        {"corral": "9", "version": "1", "device": 3, "name": [1], "cloud": [], "hub": 5},
    ],
)
def test_nonsense_from_servers_is_a_finding_and_no_fault(answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    with fake_server({}) as server:
        for path in ("GET /api/version", "GET /api/status", "POST /api/me", "GET /.well-known/corral", "GET /api/user/keys"):
            server.answers[path] = (200, answer)
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": server.host, "CORRAL_HUB": server.url}
        assert doctor(environ, capsys)[0] in (0, 1)


def test_hub_that_cannot_be_used_is_a_finding_and_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    with fake_server({"GET /api/version": (401, UNAUTHORIZED)}) as stranger:
        own = {"HOME": str(tmp_path), "OLLAMA_HOST": stranger.host, "CORRAL_HUB": "http://localhost.:9"}
        assert doctor(own, capsys)[0] == 1


@pytest.mark.parametrize("words", [["doctor"], ["list"], ["keys", "list"], ["signin"]], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OLLAMA_HOST", "http://a..b:1"),
        ("CORRAL_HUB", "https://a..b"),
        ("OLLAMA_API_KEY", "schlüssel\u2713"),
        ("OLLAMA_API_KEY", "a\r\nb: c"),
    ],
)
def test_setting_that_cannot_be_used_is_told_in_a_sentence(
    words: list[str], name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words, {"HOME": str(tmp_path), name: value}) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"Error: {name} ")
    assert len(said.splitlines()) == 1


def test_json_without_a_bottom_is_a_finding_and_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_key(tmp_path)
    with fake_server({"GET /api/version": (200, [b"[" * 60_000])}) as server:
        server.answers["POST /api/me"] = server.answers["GET /.well-known/corral"] = (200, [b"[" * 60_000])
        assert doctor({"HOME": str(tmp_path), "OLLAMA_HOST": server.host, "CORRAL_HUB": server.url}, capsys)[0] == 1


def test_other_word_than_auth_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "keys"], {"HOME": str(tmp_path)}) == 2
    assert capsys.readouterr().err.endswith("→ corral doctor --help\n")


def test_hub_option_is_the_one_that_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with corral_hub() as hub:
        _, rows = doctor({"HOME": str(tmp_path), **EMPTY}, capsys, "--hub", hub.url)
    assert rows["hub"]["detail"].startswith(f"{hub.url} (--hub)  reachable, ")


# ── Time limits ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_work_that_does_not_end_is_left_to_itself() -> None:
    forever = threading.Event()
    with pytest.raises(TimeoutError):
        await in_time(forever.wait, limit_s=0.001)
    forever.set()


async def test_work_in_time_gives_its_result_or_its_error() -> None:
    def fail() -> None:
        raise CorralError("invalid", "no")

    assert await in_time(lambda: 7, limit_s=10) == 7
    with pytest.raises(CorralError, match="no"):
        await in_time(fail, limit_s=10)


# ── The adapters' part ───────────────────────────────────────────────────────────────────────────────────────────────


def settings(home: Path, **environ: str) -> Settings:
    return Settings.from_env({"HOME": str(home), **environ})


@pytest.mark.parametrize(
    ("mode", "content", "advice"),
    [(0o644, None, "chmod 600"), (0o600, b"", "move it away"), (0o600, b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "move it away")],
)
def test_key_file_that_cannot_be_used_is_told_with_what_mends_it(
    mode: int, content: bytes | None, advice: str, tmp_path: Path
) -> None:
    with_key(tmp_path)
    path = tmp_path / ".ollama/id_ed25519"
    if content is not None:
        path.write_bytes(content)
    path.chmod(mode)
    seen, key = checkup.device_key(settings(tmp_path))
    assert key is None
    assert seen.trouble is not None
    assert advice in seen.trouble.advice
    assert str(tmp_path) not in f"{seen.trouble.message}{seen.trouble.advice}"


def test_file_of_authorized_keys_is_looked_at_where_it_is_used(tmp_path: Path) -> None:
    assert checkup.authorized(settings(tmp_path)) is None
    unused = checkup.authorized(settings(tmp_path, CORRAL_LOCAL_AUTH="remote"))
    assert unused is not None
    assert (unused.path, unused.keys, unused.trouble) == ("~/.ollama/authorized_keys", 0, None)
    with_key(tmp_path)
    path = tmp_path / ".ollama/authorized_keys"
    path.write_bytes((tmp_path / ".ollama/id_ed25519.pub").read_bytes() + b"ssh-ed25519 AAAA old\n")
    path.chmod(0o600)
    mixed = checkup.authorized(settings(tmp_path))
    assert mixed is not None
    assert (mixed.keys, mixed.complaints) == (1, ("line 2 grants nothing: its public key is damaged",))
    path.chmod(0o666)
    refused = checkup.authorized(settings(tmp_path))
    assert refused is not None
    assert refused.trouble is not None
    assert refused.trouble.advice == "close it with: chmod go-w ~/.ollama/authorized_keys"


@pytest.mark.parametrize(
    ("host", "is_own"), [("0.0.0.0", True), ("::1.2.3.4.5", False), ("192.0.2.1", False), ("box.test", False)]
)
def test_own_addresses_are_told_from_those_of_others(host: str, is_own: bool) -> None:
    assert checkup.is_own_address(host) is is_own


def test_models_folder_counts_what_is_installed(tmp_path: Path) -> None:
    missing = checkup.models_folder(settings(tmp_path))
    assert (missing.is_there, missing.has_parent) == (False, True)
    assert not checkup.models_folder(settings(tmp_path, OLLAMA_MODELS="/nonexistent/models")).has_parent
    manifest = tmp_path / ".ollama/models/manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    seen = checkup.models_folder(settings(tmp_path))
    assert (seen.path, seen.models, seen.owner) == ("~/.ollama/models", 1, checkup.own_user())
    assert seen.free_bytes is not None


def test_user_of_a_listening_port_is_read_from_the_kernels_tables(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   0: 0100007F:2CAA 00000000:0000 {} 00000000:00000000 00:00000000 00000000  {}        0 1 1 0 100 0 0 10 0\n"
    (tmp_path / "proc/net").mkdir(parents=True)
    table = tmp_path / "proc/net/tcp"
    table.write_text(head + row.format("0A", 4_000_000_000) + row.format("01", 4_000_000_001))
    assert checkup.listening_user(11434, tmp_path) == "4000000000"
    assert checkup.listening_user(11435, tmp_path) == ""
    table.write_text(head + row.format("0A", 4_000_000_000) + row.format("0A", 4_000_000_001))
    assert checkup.listening_user(11434, tmp_path) == ""
    assert checkup.listening_user(11434, tmp_path / "nothing") == ""


@pytest.mark.parametrize(("script", "name"), [("echo version: 6527 '(abc)'", "llama-server 6527"), ("true", "llama-server")])
async def test_program_that_starts_is_named_with_its_version(script: str, name: str, tmp_path: Path) -> None:
    seen = await checkup.engine(settings(tmp_path, CORRAL_LLAMA_SERVER=program(tmp_path, script)))
    assert (seen.name, seen.trouble) == (name, None)


async def test_program_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    seen = await checkup.engine(settings(tmp_path, CORRAL_LLAMA_SERVER=program(tmp_path, "echo libfoo.so is missing; exit 127")))
    assert seen.trouble is not None
    assert seen.trouble.message == "llama-server does not start (exit status 127): libfoo.so is missing"


async def test_engine_that_is_no_program_names_its_variable(tmp_path: Path) -> None:
    seen = await checkup.engine(settings(tmp_path, CORRAL_LLAMA_SERVER=str(tmp_path / "none")))
    assert seen.trouble is not None
    assert seen.trouble.advice == "correct CORRAL_LLAMA_SERVER, or unset it"


def program(folder: Path, script: str) -> str:
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_loop_that_is_gone_does_not_hurt_the_thread_that_was_left() -> None:
    release, threads = threading.Event(), set(threading.enumerate())

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await in_time(release.wait, limit_s=0.001)

    asyncio.run(leave())
    (left,) = set(threading.enumerate()) - threads
    # An exception in the thread would fail this test: warnings are errors.
    release.set()
    left.join(10)
    assert not left.is_alive()
