"""What `corral doctor` concludes from what it saw. Pure: the same facts, the same findings.

Each check is one function that gives one finding: what is so and, where that is a problem, the one thing to do. A check that
follows from another one's problem is skipped, so that each cause is counted once. Nothing is judged by a server's words: a
status, a link, an id and a date tell one reason from another, and words are passed on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from corral.cli import render
from corral.core.checkup import ApiKeySeen, Seen, ServerSeen, Standing, Trouble
from corral.core.scopes import format_scope_names
from corral.wire.discovery import origin_of
from corral.wire.signing import WINDOW_S

Status = Literal["ok", "problem", "skipped"]
#: Less is too little for all but the smallest models.
_LITTLE_BYTES: Final = 1_000_000_000
#: `Date` has whole seconds, and the answer took its time.
_CLOCK_TOLERANCE_S: Final = 4.0
_OLLAMA_HUB: Final = "https://ollama.com"
_OLLAMA_URL: Final = "http://127.0.0.1:11434"
_SET_CLOCK: Final = {"darwin": "sudo sntp -sS time.apple.com", "win32": "w32tm /resync"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row. fix: the one thing to do, empty unless it is a problem."""

    check: str
    status: Status
    detail: str
    fix: str = ""

    def as_object(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"check": self.check, "status": self.status, "detail": self.detail, "fix": self.fix or None}


def findings(seen: Seen, *, checks: "Sequence[tuple[str, Check]]") -> list[Finding]:
    """One finding for each check that has something to say, in their order."""
    judged = ((name, judge(seen)) for name, judge in checks)
    return [Finding(check=name, status=verdict[0], detail=verdict[1], fix=verdict[2]) for name, verdict in judged if verdict]


#: (status, detail, fix); None where there is nothing to say.
Verdict = tuple[Status, str, str]
Check = Callable[[Seen], Verdict | None]


def _ok(detail: str) -> Verdict:
    return "ok", detail, ""


def _skipped(detail: str) -> Verdict:
    return "skipped", detail, ""


def _problem(detail: str, fix: str) -> Verdict:
    return "problem", detail, fix


def _trouble(trouble: Trouble, otherwise: str) -> Verdict:
    """What an adapter said, with its own advice where it had one."""
    return _problem(trouble.message, trouble.advice or otherwise)


# ── This machine ─────────────────────────────────────────────────────────────────────────────────────────────────────


def settings_row(seen: Seen) -> Verdict | None:
    """A variable whose value is not used as it stands."""
    return _problem(seen.warnings[0], "correct that variable, or unset it") if seen.warnings else None


def server_row(seen: Seen) -> Verdict:
    """Whether a server answers at OLLAMA_HOST, and which."""
    server = seen.server
    if server.is_absent:
        return _no_server(seen)
    if server.is_hub:
        return _ok(f"{server.url}  a hub")
    if server.status == 401:
        return _ok(f"{server.url}  asks for a credential")
    if server.status == 403 and not server.message:
        return _problem(f"{server.url} refuses requests under that name", "have OLLAMA_HOST name it by its IP address")
    if server.status:
        said = f": {server.message}" if server.message else ""
        return _problem(f"{server.url} answered {server.status}{said}", "check OLLAMA_HOST; the server's log says why")
    if server.trouble is not None or not server.is_answering:
        trouble = server.trouble or Trouble(f"{server.url} does not answer like an Ollama server")
        return _trouble(trouble, "check OLLAMA_HOST; another program may have that port")
    if not server.corral:
        return _ok(f"{server.url}  Ollama {server.ollama}")
    if server.corral != seen.version and _is_of_others(seen):
        return _ok(f"{server.url}  Corral {server.corral}; this command is {seen.version}")
    if server.corral != seen.version:
        detail = f"{server.url}  Corral {server.corral}, and this command is {seen.version}"
        return _problem(detail, "start the local server anew with the installed version: corral serve")
    return _ok(f"{server.url}  Corral {server.corral}")


def _no_server(seen: Seen) -> Verdict:
    server, detail = seen.server, f"nothing listens on {seen.server.url}"
    if any(warning.startswith("OLLAMA_HOST") for warning in seen.warnings):
        return _skipped(f"{detail}: see the settings")
    if not server.is_here:
        return _problem(detail, "start the server there, or unset OLLAMA_HOST to use this machine's")
    if _is_own_hub_down(seen):
        return _skipped(f"{detail}: see the hub")
    return _problem(detail, "corral serve" if server.url == _OLLAMA_URL else "corral serve, or correct OLLAMA_HOST")


def models_row(seen: Seen) -> Verdict:
    """The folder of models: there, readable, with room."""
    folder = seen.models
    if folder is None:
        return _skipped(f"OLLAMA_HOST names another machine, {seen.server.url}")
    if not folder.is_there:
        if not folder.has_parent:
            return _problem(
                f"{folder.path} is not there, nor is the folder it belongs into", "check OLLAMA_MODELS; is its disk mounted?"
            )
        return _ok(f"{folder.path}  made with the first model{_room(folder.free_bytes)}")
    if not folder.is_readable:
        return _problem(f"{folder.path} belongs to {folder.owner} and cannot be read by {seen.user}", _take_over(folder.path))
    # Where somebody else runs the server, models are written by them.
    if not folder.is_writable and seen.server.user in ("", seen.user):
        return _problem(f"{folder.path} belongs to {folder.owner} and cannot be written by {seen.user}", _take_over(folder.path))
    if folder.free_bytes is not None and folder.free_bytes < _LITTLE_BYTES:
        detail = f"{folder.path}  only {render.size(folder.free_bytes)} free"
        return _problem(detail, "remove models (corral rm), or have OLLAMA_MODELS name a folder on a larger disk")
    count = "1 model" if folder.models == 1 else f"{folder.models} models"
    return _ok(f"{folder.path}  {count}{_room(folder.free_bytes)}")


def _room(free_bytes: int | None) -> str:
    return "" if free_bytes is None else f", {render.size(free_bytes)} free"


def _take_over(path: str) -> str:
    return f"sudo chown -R $(id -un) {path}"


def engine_row(seen: Seen) -> Verdict:
    """Whether the engine can be started."""
    if seen.engine is None:
        return _skipped(f"OLLAMA_HOST names another machine, {seen.server.url}")
    if seen.engine.trouble is not None:
        return _trouble(seen.engine.trouble, "install Corral anew; its engine is a part of it")
    return _ok(f"{seen.engine.name}  starts")


def authorized_row(seen: Seen) -> Verdict | None:
    """Who may use this machine's server, where that was set up: every line counts, or it is said why not."""
    file = seen.authorized
    if file is None:
        return None
    if file.trouble is not None:
        return _trouble(file.trouble, f"move {file.path} away, and make another: corral authorize add")
    if file.complaints:
        more = ", ".join(complaint.partition(" grants ")[0] for complaint in file.complaints[1:])
        return _problem(f"{file.path}  {file.complaints[0]}{f'; also {more}' if more else ''}", f"correct it in {file.path}")
    return _ok(f"{file.path}  {'1 key' if file.keys == 1 else f'{file.keys} keys'}")


def proxy_row(seen: Seen) -> Verdict | None:
    """HTTP_PROXY without an exception for this machine: no matter for us, but for the libraries that talk to the local server."""
    if not seen.is_loopback_proxied or not seen.server.is_here:
        return None
    detail = f"HTTP_PROXY is set, so other programs send what is for {seen.server.url} to the proxy"
    return _problem(detail, "export NO_PROXY=localhost,127.0.0.1,::1")


# ── Who this machine is ──────────────────────────────────────────────────────────────────────────────────────────────


def key_row(seen: Seen) -> Verdict:
    """The device key: there, private, whole."""
    key = seen.key
    if key.trouble is not None:
        return _trouble(key.trouble, f"move {key.path} away and run corral signin")
    if key.fingerprint:
        return _ok(f"{key.path}  ok ({key.mode:04o}, yours)")
    if not seen.hub.is_asked or _needs_no_device(seen) or (_is_hub_idle(seen) and not seen.is_signing):
        return _skipped(f"{key.path}  none yet")
    return _problem(f"{key.path} is not there: this user ({seen.user}) has not signed in yet", _sign_in(seen))


def fingerprint_row(seen: Seen) -> Verdict | None:
    """What the connect page shows of the key."""
    return _ok(seen.key.fingerprint) if seen.key.fingerprint else None


def memory_row(seen: Seen) -> Verdict | None:
    """What is remembered of hubs, when it cannot be read."""
    return None if seen.memory_trouble is None else _trouble(seen.memory_trouble, "remove it and run corral signin again")


def hub_row(seen: Seen) -> Verdict:
    """Whether the hub in use can be reached."""
    hub = seen.hub
    where = f"{hub.url} ({_source(seen)})" if hub.source != "default" else hub.url
    if not hub.is_asked:
        why = "the cloud is switched off" if seen.memory_trouble is None else "what was chosen cannot be read"
        return _skipped(f"none was named, and {why}")
    if not hub.is_private_line:
        return _problem(f"{where} would be reached by plain http, where others can copy a credential", "give its https address")
    if _is_hub_idle(seen) and not hub.is_well:
        why = hub.trouble.message if hub.trouble is not None else f"nothing listens on {hub.url}"
        return _skipped(f"{why}; nobody chose it, and the server works without")
    if _is_own_hub_down(seen) and seen.server.is_absent and seen.server.is_here:
        return _problem(f"{where}  nothing listens there, nor on {seen.server.url}", "start both: corral up")
    if hub.is_absent:
        start = "start it: corral up" if _is_here(hub.url) else _other_hub(seen)
        return _problem(f"{where}  nothing listens there", start)
    if hub.trouble is not None:
        return _trouble(hub.trouble, _other_hub(seen))
    tls = ", TLS ok" if hub.url.startswith("https:") else ""
    way = f", by the proxy {hub.proxy}" if hub.proxy else ""
    return _ok(f"{where}  reachable{tls}{way}, {hub.took_ms} ms")


def _source(seen: Seen) -> str:
    return {"the local server": "of the local server", "the last sign-in": "of the last sign-in"}.get(
        seen.hub.source, seen.hub.source
    )


def _other_hub(seen: Seen) -> str:
    """What to do where the hub's address may be the mistake."""
    match seen.hub.source:
        case "--hub":
            return "check the address"
        case "CORRAL_HUB":
            return "check CORRAL_HUB"
        case "the local server":
            return "check the CORRAL_HUB that the local server was started with"
        case "the last sign-in" | "default":
            return "to use a hub of your own: corral signin --hub URL (corral up starts one)"


def clock_row(seen: Seen) -> Verdict:
    """How far this machine's clock is from the hub's."""
    offset_s = seen.hub.clock_offset_s
    if not seen.hub.is_well or offset_s is None:
        return _skipped("the hub's is not known")
    if abs(offset_s) <= _CLOCK_TOLERANCE_S:
        return _ok("the same as the hub's")
    detail = f"{abs(offset_s):.0f} s {'behind' if offset_s > 0 else 'ahead of'} the hub"
    if abs(offset_s) <= WINDOW_S:
        return _ok(f"{detail}, which it tolerates")
    command = _SET_CLOCK.get(seen.platform, "sudo timedatectl set-ntp true")
    return _problem(detail, f"set this machine's clock (the hub refuses signatures older than {WINDOW_S} s): {command}")


def device_row(seen: Seen) -> Verdict:
    """Whether the hub knows this device's key, as whose, and what it may do."""
    if not seen.key.fingerprint:
        return _skipped("not asked: there is no usable key")
    if not seen.hub.is_well:
        return _skipped("not asked: the hub did not answer" if seen.hub.is_asked else "not asked")
    if seen.memory_trouble is not None:
        return _skipped("not asked: what was agreed with the hub is not known")
    device = seen.device
    if device is None:
        return _skipped("not asked: the hub would refuse this clock")
    if device.trouble is not None:
        return _trouble(device.trouble, _other_hub(seen))
    if device.account:
        return _connected(seen, device)
    # Ollama's hub says 200 and leaves the name empty.
    if device.has_link or (device.status in (200, 401) and not seen.hub.is_corral):
        return _not_connected(seen)
    return _refused(seen, device)


def _connected(seen: Seen, device: Standing) -> Verdict:
    since = f" since {device.since:%Y-%m-%d}" if device.since else ""
    detail = f"connected to {device.account}{since}"
    if device.may_run is False:
        what = f", may do: {format_scope_names(device.scopes)}" if device.scopes is not None else ""
        fix = f"tick inference for this device on {seen.hub.url}/settings/keys"
        return _problem(f"{detail}, but may not run models{what}", fix)
    return _ok(detail)


def _not_connected(seen: Seen) -> Verdict:
    host = _host(seen.hub.url)
    if seen.saved_hub and not _is_same(seen.saved_hub, seen.hub.url):
        detail = f"not connected to {host}; the last sign-in was to {_host(seen.saved_hub)}"
        if seen.hub.source == "CORRAL_HUB":
            return _problem(detail, f"unset CORRAL_HUB to go back there, or connect here as well: {_sign_in(seen)}")
        if seen.hub.source == "the local server":
            return _problem(detail, f"{_sign_in(seen)}; to go back, restart the local server with CORRAL_HUB={seen.saved_hub}")
        return _problem(detail, _sign_in(seen))
    if _needs_no_device(seen):
        return _skipped(f"not connected to {host}; commands use OLLAMA_API_KEY")
    if _is_hub_idle(seen) and _is_of_others(seen):
        return _skipped(f"not connected to {host}, which nobody chose")
    if seen.saved_hub:
        return _problem(f"no longer connected to {host}: signed out, revoked, or the key file is another one", _sign_in(seen))
    return _problem(f"not connected to any account of {host}", _sign_in(seen))


def _refused(seen: Seen, device: Standing) -> Verdict:
    """An answer that is neither an account nor a link to sign in at."""
    host = _host(seen.hub.url)
    said = f": {device.message}" if device.message else ""
    match device.status:
        case 401:
            # A signature that is wrong is answered so too, and ours is not: the owner is what is left.
            detail = f"{host} knows this device and refuses it: its account is disabled"
            return _problem(detail, "ask an administrator of the hub: corral hub user enable NAME")
        case 403:
            return _problem(f"{host} refuses signed requests{said}", "ask whoever runs the hub, with these words")
        case 429:
            return _problem(f"{host} was asked too often{said}", "wait a minute, and run corral doctor again")
        # A web server that is no hub does not implement what it was asked.
        case status if status >= 500 and status != 501:
            return _problem(f"{host} answered {status}{said}", "the hub's log says why: ask whoever runs it")
        case status:
            return _problem(f"{host} answered {status} when asked who this is{said}", f"is that a hub? {_other_hub(seen)}")


# ── The local server at the hub ──────────────────────────────────────────────────────────────────────────────────────


def relay_row(seen: Seen) -> Verdict:
    """Whether cloud models run through the local server: switched on, the same hub, a key that is connected."""
    server, hub = seen.server, seen.hub
    if server.is_answering and not server.is_hub and _is_of_others(seen):
        return _server_of_others(server)
    off = server.cloud_off_by if server.is_answering else "env" if seen.is_cloud_off_here else ""
    if off:
        return _switched_off(seen, off)
    if server.is_hub:
        return _server_is_hub(seen)
    if server.status == 401:
        return _server_wants_credential(seen)
    if not server.is_answering:
        return _skipped("no local server answers")
    if hub.is_asked and not hub.is_well:
        return _skipped("not asked: the hub comes first")
    if not server.corral and not _is_same(hub.url, _OLLAMA_HUB):
        detail = f"{server.url} is Ollama's server, whose cloud models run at ollama.com"
        return _problem(detail, "stop it and run corral serve instead, or give that one another OLLAMA_HOST")
    if server.hub and not _is_same(server.hub, hub.url):
        detail = f"the local server uses the hub {server.hub}"
        return (
            _skipped(detail) if hub.source in ("--hub", "default") else _problem(detail, f"restart it with CORRAL_HUB={hub.url}")
        )
    if server.standing is None:
        if not seen.key.fingerprint:
            return _skipped("not asked: there is no usable key")
        return _skipped("not asked: this device comes first" if hub.is_well else "not asked")
    if clock_row(seen)[0] == "problem":
        return _skipped("not known until the clock is right")
    return _standing_of_server(seen, server.standing)


def _server_of_others(server: ServerSeen) -> Verdict:
    """Which hub it uses, and whether it is connected there, is for whoever runs it."""
    way = "OLLAMA_API_KEY is taken" if server.took_key else "this device is let in" if server.is_let_in else "it asks for nothing"
    if server.cloud_off_by:
        cloud = "its cloud models are switched off"
    elif server.standing is not None and server.standing.account:
        cloud = f"it runs cloud models as {server.standing.account}"
    else:
        cloud = f"its hub is {server.hub or _OLLAMA_HUB}"
    return _ok(f"{server.url}: {way}, {cloud}")


def _server_wants_credential(seen: Seen) -> Verdict:
    url = seen.server.url
    if seen.is_signing and not seen.key.fingerprint:
        return _skipped("not known: there is no usable key")
    if seen.authorized is not None and seen.authorized.trouble is not None:
        return _skipped(f"{url} lets nobody in: see authorized_keys")
    if seen.is_signing:
        return _problem(
            f"{url} does not know this device's key",
            f"let it in there: corral authorize add --name NAME KEY, the KEY in {seen.key.path}.pub",
        )
    if url.startswith("http:") and not _is_here(url):
        fix = "set OLLAMA_AUTH=1 to sign; over plain http it gets no API key"
        return _problem(f"{url} asks for a credential", fix)
    if seen.api_key is not None:
        return _problem(f"{url} does not take OLLAMA_API_KEY", "make one there: corral authorize key NAME")
    return _problem(f"{url} asks for a credential", "put its key into OLLAMA_API_KEY, or set OLLAMA_AUTH=1 to sign")


def _server_is_hub(seen: Seen) -> Verdict:
    if seen.api_key is not None:
        return _ok(f"OLLAMA_HOST names a hub, {seen.server.url}, which is asked with OLLAMA_API_KEY")
    detail = f"OLLAMA_HOST names {seen.server.url}, which is a hub and asks for a credential"
    return _problem(detail, f"unset OLLAMA_HOST, and name the hub by CORRAL_HUB={seen.server.url}")


def _switched_off(seen: Seen, off: str) -> Verdict:
    detail = f"cloud models are switched off by {_SWITCHES.get(off, off)}"
    # Who chose a hub wants it; who did not has got what they asked for.
    if seen.hub.source == "default":
        return _skipped(detail)
    if off == "config":
        return _problem(detail, "take disable_ollama_cloud out of that file")
    return _problem(detail, "unset OLLAMA_NO_CLOUD and restart the local server")


_SWITCHES: Final = {
    "env": "OLLAMA_NO_CLOUD",
    "config": "~/.ollama/server.json",
    "both": "OLLAMA_NO_CLOUD and ~/.ollama/server.json",
}


def _standing_of_server(seen: Seen, standing: Standing) -> Verdict:
    if standing.trouble is not None:
        return _trouble(standing.trouble, "restart the local server")
    if standing.account:
        return _server_account(seen, standing)
    if standing.status == 403:
        return _skipped(f"not told: {standing.message or 'this credential may not use its account'}")
    if standing.status not in (200, 401):
        said = standing.message or f"it answered {standing.status}"
        return _problem(f"the local server cannot tell who it is: {said}", "restart the local server")
    if standing.fingerprint and standing.fingerprint == seen.key.fingerprint:
        if seen.device is not None and seen.device.account:
            return _problem("the local server is refused with this key, which is connected", "restart the local server")
        return _skipped("the local server signs with this key")
    whose = f" {standing.fingerprint}" if standing.fingerprint else ""
    detail = f"the local server{_run_by(seen)} signs with another key{whose}, which is not connected"
    return _problem(detail, _sign_server_in(seen))


def _server_account(seen: Seen, standing: Standing) -> Verdict:
    own = seen.device or Standing()
    if standing.device_id and standing.device_id == own.device_id:
        return _ok("the local server signs with this key")
    name = f" ({standing.device_name})" if standing.device_name else ""
    if own.account and own.account != standing.account:
        detail = (
            f"the local server{_run_by(seen)} runs cloud models as {standing.account}{name}, this command acts as {own.account}"
        )
        return _problem(detail, "run it as yourself: corral serve")
    is_other = bool(standing.device_id and own.device_id) or not own.account
    return _ok(f"the local server runs cloud models as {standing.account}" + (f", by another key{name}" if is_other else ""))


def _run_by(seen: Seen) -> str:
    return f", run by {seen.server.user}," if seen.server.user not in ("", seen.user) else ""


def _sign_server_in(seen: Seen) -> str:
    server = seen.server
    if server.user in ("", seen.user):
        return "restart the local server with this home folder: corral serve"
    return f"sudo -u {server.user} -H {_sign_in(seen)}"


# ── The API key ──────────────────────────────────────────────────────────────────────────────────────────────────────


def api_key_row(seen: Seen) -> Verdict:
    """Whether OLLAMA_API_KEY is accepted, as whose, and what it may do."""
    key = seen.api_key
    if key is None:
        return _skipped("not set")
    shown = f"{key.prefix}…" if key.prefix else "set"
    if seen.server.took_key:
        return _ok(f"{shown}  taken by {seen.server.url}")
    if not seen.hub.is_well:
        return _skipped(f"{shown}  not tried")
    if key.standing is None:
        return _wrong_kind(seen, key)
    standing = key.standing
    if standing.trouble is not None:
        return _problem(f"{shown}  {standing.trouble.message}", standing.trouble.advice or _other_hub(seen))
    if standing.status == 200:
        return _accepted(seen, key, standing, shown)
    if standing.status == 401:
        return _refused_key(seen, key, shown)
    said = f": {standing.message}" if standing.message else ""
    return _problem(
        f"{shown}  {_host(seen.hub.url)} answered {standing.status}{said}", "the hub's log says why: ask whoever runs it"
    )


def _wrong_kind(seen: Seen, key: ApiKeySeen) -> Verdict:
    """A key that was not shown to the hub: it cannot be its own, and would be told to a stranger."""
    if key.prefix:
        return _problem(
            f"{key.prefix}…  is of a Corral hub, and {_host(seen.hub.url)} is none", "set CORRAL_HUB to the hub that made it"
        )
    return _problem(f"set, but it {key.fault}", f"take one from {seen.hub.url}/settings/keys, or unset OLLAMA_API_KEY")


def _accepted(seen: Seen, key: ApiKeySeen, standing: Standing, shown: str) -> Verdict:
    own = seen.device.account if seen.device is not None else ""
    if own and standing.account and own != standing.account:
        return _problem(f"{shown}  valid, but of {standing.account}, while this device is {own}'s", "unset OLLAMA_API_KEY")
    words = [f"{shown}  valid"]
    words += [format_scope_names(key.scopes)] if key.scopes is not None else []
    words += [_expiry(key.expires_at, seen.now)] if key.is_listed else []
    if standing.may_run is False:
        fix = "use one with the scope inference: corral keys create NAME --scope inference"
        return _problem(" · ".join([*words, "runs no models"]), fix)
    return _ok(" · ".join(words))


def _expiry(expires_at: datetime | None, now: datetime) -> str:
    if expires_at is None:
        return "does not expire"
    return f"expires in {render.relative_time(expires_at, now).removesuffix(' from now')}"


def _refused_key(seen: Seen, key: ApiKeySeen, shown: str) -> Verdict:
    host, page = _host(seen.hub.url), f"{seen.hub.url}/settings/keys"
    another = f"take another one from {page}, or unset OLLAMA_API_KEY"
    if key.revoked_at is not None:
        return _problem(f"{shown}  revoked on {key.revoked_at:%Y-%m-%d}", another)
    if key.expires_at is not None and key.expires_at <= seen.now:
        return _problem(f"{shown}  expired on {key.expires_at:%Y-%m-%d}", another)
    if key.is_listed is False and seen.device is not None:
        return _problem(f"{shown}  refused by {host}: no key of {seen.device.account}", another)
    return _problem(f"{shown}  refused by {host}: revoked, expired, or of another hub", another)


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_of_others(seen: Seen) -> bool:
    """Whether somebody else answers for the server: on another machine, or one that let us in though we keep no such file."""
    server = seen.server
    return not server.is_here or (server.is_let_in and (server.user not in ("", seen.user) or seen.authorized is None))


def _is_hub_idle(seen: Seen) -> bool:
    """Whether nobody chose the hub, and it may be missing: a server works, and is somebody's or does without."""
    is_working = seen.server.is_answering or seen.server.status == 401
    return seen.hub.source == "default" and is_working and (_is_of_others(seen) or not seen.hub.is_well)


def _is_own_hub_down(seen: Seen) -> bool:
    return seen.hub.is_asked and seen.hub.is_absent and _is_here(seen.hub.url)


def _needs_no_device(seen: Seen) -> bool:
    """Whether an API key does all that there is to do: a local server would need the device."""
    key = seen.api_key
    return key is not None and key.standing is not None and key.standing.status == 200 and not seen.server.is_answering


def _sign_in(seen: Seen) -> str:
    """The command that connects this device, with the hub named where it would take another one by itself."""
    return f"corral signin --hub {seen.hub.url}" if seen.hub.source == "--hub" else "corral signin"


def _host(url: str) -> str:
    return url.partition("://")[2]


def _is_here(url: str) -> bool:
    address = origin_of(url)
    return address is not None and address.is_loopback


def _is_same(one: str, other: str) -> bool:
    first, second = origin_of(one), origin_of(other)
    return first is not None and second is not None and first.is_same_place(second)


#: The rows of `corral doctor auth`.
IDENTITY: Final[Sequence[tuple[str, Check]]] = (
    ("authorized_keys", authorized_row),
    ("key file", key_row),
    ("fingerprint", fingerprint_row),
    ("corral.json", memory_row),
    ("hub", hub_row),
    ("clock", clock_row),
    ("device", device_row),
    ("relay", relay_row),
    ("OLLAMA_API_KEY", api_key_row),
)
#: The rows of `corral doctor`.
EVERYTHING: Final[Sequence[tuple[str, Check]]] = (
    ("settings", settings_row),
    ("local server", server_row),
    ("models", models_row),
    ("engine", engine_row),
    ("proxy", proxy_row),
    *IDENTITY,
)
