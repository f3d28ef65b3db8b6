"""What `corral doctor` concludes: a row of this table for every finding, and what it counts once."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from corral.cli.doctor_findings import EVERYTHING, Finding, findings
from corral.core.checkup import (
    ApiKeySeen,
    AuthorizedSeen,
    EngineSeen,
    HubSeen,
    KeyFile,
    ModelsFolder,
    Seen,
    ServerSeen,
    Standing,
    Trouble,
)

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HUB, LOCAL, PAGE = "https://hub.test", "http://127.0.0.1:11434", "https://hub.test/settings/keys"
FINGERPRINT, OTHER = "SHA256:mine", "SHA256:theirs"
DEVICE = Standing(
    status=200, account="alice", device_id="d1", since=NOW - timedelta(days=18), scopes=("inference",), may_run=True
)
SERVER = ServerSeen(
    url=LOCAL,
    corral="0.1.0",
    ollama="0.34.0",
    hub=HUB,
    user="alice",
    standing=Standing(status=200, account="alice", device_id="d1"),
)
WELL = HubSeen(url=HUB, source="CORRAL_HUB", is_corral=True, took_ms=38, clock_offset_s=0.4)
FOLDER = ModelsFolder(path="~/.ollama/models", owner="alice", free_bytes=68_000_000_000, models=2)
#: All is well.
SEEN = Seen(
    now=NOW,
    platform="linux",
    version="0.1.0",
    user="alice",
    key=KeyFile(path="~/.ollama/id_ed25519", fingerprint=FINGERPRINT, mode=0o600),
    server=SERVER,
    hub=WELL,
    saved_hub=HUB,
    device=DEVICE,
    models=FOLDER,
    engine=EngineSeen(name="llama.cpp, embedded"),
)
NO_SERVER = ServerSeen(url=LOCAL, is_absent=True)
GUEST = replace(SERVER, url="http://box:11500", hub="https://ollama.com", is_here=False, is_let_in=True, user="", standing=None)
NO_LINK = Standing(status=401)
UNKNOWN = Standing(status=401, has_link=True, fingerprint=FINGERPRINT)
STOCK_HUB = HubSeen(url="https://ollama.com", source="default", took_ms=9, clock_offset_s=0.0)
KEY = ApiKeySeen(
    prefix="crlk_9fK2",
    standing=Standing(status=200, account="alice", may_run=True),
    is_listed=True,
    scopes=("inference",),
    expires_at=NOW + timedelta(days=12, hours=1),
)
REFUSED_KEY = replace(KEY, standing=NO_LINK, expires_at=None)
ANOTHER = f"take another one from {PAGE}, or unset OLLAMA_API_KEY"
RELAY = "restart the local server"


@dataclass(frozen=True)
class Case:
    """check: the row. changes: what was seen otherwise. status, detail, fix: of that row."""

    name: str
    check: str
    changes: dict[str, Any]
    status: str
    detail: str
    fix: str = ""
    #: How many problems there are in all.
    problems: int = field(default=-1)


def ok(name: str, check: str, detail: str, **changes: Any) -> Case:
    return Case(name, check, changes, "ok", detail)


def skipped(name: str, check: str, detail: str, **changes: Any) -> Case:
    return Case(name, check, changes, "skipped", detail)


def problem(name: str, check: str, detail: str, fix: str, *, problems: int = 1, **changes: Any) -> Case:
    return Case(name, check, changes, "problem", detail, fix, problems)


def server(**changes: Any) -> ServerSeen:
    return replace(SERVER, **changes)


def hub(**changes: Any) -> HubSeen:
    return replace(WELL, **changes)


def key_file(**changes: Any) -> KeyFile:
    return replace(SEEN.key, **changes)


def folder(**changes: Any) -> ModelsFolder:
    return replace(FOLDER, **changes)


def relayed(**changes: Any) -> ServerSeen:
    return server(standing=Standing(**changes))


CASES = [
    # ── This machine ──
    problem("ignored", "settings", "X is ignored", "correct that variable, or unset it", warnings=("X is ignored",)),
    ok("ours", "local server", f"{LOCAL}  Corral 0.1.0"),
    problem("absent", "local server", f"nothing listens on {LOCAL}", "corral serve", server=NO_SERVER),
    problem(
        "absent at a chosen address",
        "local server",
        "nothing listens on http://127.0.0.1:7",
        "corral serve, or correct OLLAMA_HOST",
        server=replace(NO_SERVER, url="http://127.0.0.1:7"),
    ),
    skipped(
        "absent where nobody meant",
        "local server",
        f"nothing listens on {LOCAL}: see the settings",
        server=NO_SERVER,
        warnings=("OLLAMA_HOST names the port '99999', which is none; using 11434",),
    ),
    problem(
        "absent elsewhere",
        "local server",
        "nothing listens on http://box:11434",
        "start the server there, or unset OLLAMA_HOST to use this machine's",
        server=replace(NO_SERVER, url="http://box:11434", is_here=False),
    ),
    problem(
        "other version",
        "local server",
        f"{LOCAL}  Corral 0.0.9, and this command is 0.1.0",
        "start the local server anew with the installed version: corral serve",
        server=server(corral="0.0.9"),
    ),
    problem(
        "another program",
        "local server",
        f"{LOCAL} does not answer like an Ollama server",
        "check OLLAMA_HOST; another program may have that port",
        server=ServerSeen(url=LOCAL),
    ),
    problem(
        "no TLS",
        "local server",
        "not accepted",
        "SSL_CERT_FILE",
        server=ServerSeen(url=LOCAL, trouble=Trouble("not accepted", "SSL_CERT_FILE")),
    ),
    problem(
        "other name",
        "local server",
        f"{LOCAL} refuses requests under that name",
        "have OLLAMA_HOST name it by its IP address",
        server=ServerSeen(url=LOCAL, status=403),
    ),
    problem(
        "server in trouble",
        "local server",
        f"{LOCAL} answered 503: too busy",
        "check OLLAMA_HOST; the server's log says why",
        server=ServerSeen(url=LOCAL, status=503, message="too busy"),
    ),
    ok("stock server", "local server", f"{LOCAL}  Ollama 0.12.0", server=server(corral="", ollama="0.12.0")),
    ok("folder", "models", "~/.ollama/models  2 models, 68 GB free"),
    ok("one model", "models", "~/.ollama/models  1 model", models=folder(models=1, free_bytes=None)),
    ok("no folder yet", "models", "~/.ollama/models  made with the first model, 68 GB free", models=folder(is_there=False)),
    problem(
        "no disk",
        "models",
        "/mnt/models is not there, nor is the folder it belongs into",
        "check OLLAMA_MODELS; is its disk mounted?",
        models=folder(path="/mnt/models", is_there=False, has_parent=False),
    ),
    problem(
        "closed folder",
        "models",
        "/m belongs to ollama and cannot be read by alice",
        "sudo chown -R $(id -un) /m",
        models=folder(path="/m", owner="ollama", is_readable=False),
    ),
    problem(
        "folder of others",
        "models",
        "/m belongs to ollama and cannot be written by alice",
        "sudo chown -R $(id -un) /m",
        models=folder(path="/m", owner="ollama", is_writable=False),
    ),
    ok(
        "folder of the server's user",
        "models",
        "/m  2 models, 68 GB free",
        models=folder(path="/m", owner="ollama", is_writable=False),
        server=server(user="ollama"),
    ),
    problem(
        "full disk",
        "models",
        "~/.ollama/models  only 999 MB free",
        "remove models (corral rm), or have OLLAMA_MODELS name a folder on a larger disk",
        models=folder(free_bytes=999_000_000),
    ),
    skipped("models elsewhere", "models", f"OLLAMA_HOST names another machine, {LOCAL}", models=None),
    ok("engine", "engine", "llama.cpp, embedded  starts"),
    skipped("engine elsewhere", "engine", f"OLLAMA_HOST names another machine, {LOCAL}", engine=None),
    problem(
        "broken engine",
        "engine",
        "it does not start",
        "install Corral anew; its engine is a part of it",
        engine=EngineSeen(trouble=Trouble("it does not start")),
    ),
    problem("no such engine", "engine", "no program", "unset it", engine=EngineSeen(trouble=Trouble("no program", "unset it"))),
    ok("authorized", "authorized_keys", "~/k  2 keys", authorized=AuthorizedSeen(path="~/k", keys=2)),
    problem(
        "ignored lines",
        "authorized_keys",
        "~/k  line 2 grants nothing: its public key is damaged; also line 5",
        "correct it in ~/k",
        authorized=AuthorizedSeen(
            path="~/k", complaints=("line 2 grants nothing: its public key is damaged", "line 5 grants nothing: x")
        ),
    ),
    problem(
        "changeable",
        "authorized_keys",
        "~/k can be changed",
        "chmod go-w ~/k",
        authorized=AuthorizedSeen(path="~/k", trouble=Trouble("~/k can be changed", "chmod go-w ~/k")),
    ),
    skipped(
        "secured by a changeable file",
        "relay",
        f"{LOCAL} lets nobody in: see authorized_keys",
        authorized=AuthorizedSeen(path="~/k", trouble=Trouble("~/k can be changed", "chmod go-w ~/k")),
        server=ServerSeen(url=LOCAL, status=401),
    ),
    skipped(
        "default hub beside a secured server",
        "hub",
        "gone; nobody chose it, and the server works without",
        hub=replace(STOCK_HUB, trouble=Trouble("gone")),
        server=ServerSeen(url=LOCAL, status=401),
        device=None,
    ),
    problem(
        "proxied loopback",
        "proxy",
        f"HTTP_PROXY is set, so other programs send what is for {LOCAL} to the proxy",
        "export NO_PROXY=localhost,127.0.0.1,::1",
        is_loopback_proxied=True,
    ),
    # ── The key file ──
    ok("private", "key file", "~/.ollama/id_ed25519  ok (0600, yours)"),
    problem(
        "missing",
        "key file",
        "~/.ollama/id_ed25519 is not there: this user (alice) has not signed in yet",
        "corral signin",
        key=key_file(fingerprint=""),
        device=None,
    ),
    problem(
        "open to others",
        "key file",
        "it can be read by other users",
        "close it with: chmod 600 it",
        key=key_file(fingerprint="", trouble=Trouble("it can be read by other users", "close it with: chmod 600 it")),
        device=None,
    ),
    problem(
        "damaged without advice",
        "key file",
        "it cannot be read",
        "move ~/.ollama/id_ed25519 away and run corral signin",
        key=key_file(fingerprint="", trouble=Trouble("it cannot be read")),
        device=None,
    ),
    skipped(
        "missing and not needed",
        "key file",
        "~/.ollama/id_ed25519  none yet",
        key=key_file(fingerprint=""),
        device=None,
        api_key=KEY,
        server=NO_SERVER,
    ),
    ok("fingerprint", "fingerprint", FINGERPRINT),
    problem(
        "damaged memory",
        "corral.json",
        "it is damaged",
        "repair it",
        memory_trouble=Trouble("it is damaged", "repair it"),
        device=None,
    ),
    # ── The hub ──
    ok("reachable", "hub", f"{HUB} (CORRAL_HUB)  reachable, TLS ok, 38 ms"),
    ok(
        "reachable by a proxy",
        "hub",
        f"{HUB} (of the last sign-in)  reachable, TLS ok, by the proxy proxy:3128, 38 ms",
        hub=hub(source="the last sign-in", proxy="proxy:3128"),
    ),
    skipped("not wanted", "hub", "none was named, and the cloud is switched off", hub=replace(STOCK_HUB, is_asked=False)),
    problem(
        "plain http",
        "hub",
        "http://hub.test (--hub) would be reached by plain http, where others can copy a credential",
        "give its https address",
        hub=hub(url="http://hub.test", source="--hub", is_private_line=False),
        device=None,
    ),
    problem(
        "own hub is down",
        "hub",
        "http://localhost:11435 (CORRAL_HUB)  nothing listens there",
        "start it: corral up",
        hub=hub(url="http://localhost:11435", is_absent=True),
        device=None,
    ),
    problem(
        "own hub and server are down",
        "hub",
        f"http://localhost:11435 (CORRAL_HUB)  nothing listens there, nor on {LOCAL}",
        "start both: corral up",
        hub=hub(url="http://localhost:11435", is_absent=True),
        server=NO_SERVER,
        device=None,
    ),
    skipped(
        "default hub not needed",
        "hub",
        "gone; nobody chose it, and the server works without",
        hub=replace(STOCK_HUB, trouble=Trouble("gone")),
        device=None,
    ),
    problem(
        "hub is down",
        "hub",
        f"{HUB} (CORRAL_HUB)  nothing listens there",
        "check CORRAL_HUB",
        hub=hub(is_absent=True),
        device=None,
    ),
    problem("hub says why", "hub", "TLS", "SSL_CERT_FILE", hub=hub(trouble=Trouble("TLS", "SSL_CERT_FILE")), device=None),
    *(
        problem(
            f"hub of {source}",
            "hub",
            "gone",
            fix,
            hub=hub(source=source, trouble=Trouble("gone")),
            device=None,
            # Where a server works, nobody needs the default.
            server=NO_SERVER if source == "default" else SERVER,
            problems=2 if source == "default" else 1,
        )
        for source, fix in {
            "--hub": "check the address",
            "the local server": "check the CORRAL_HUB that the local server was started with",
            "the last sign-in": "to use a hub of your own: corral signin --hub URL (corral up starts one)",
            "default": "to use a hub of your own: corral signin --hub URL (corral up starts one)",
        }.items()
    ),
    # ── The clock ──
    ok("same clock", "clock", "the same as the hub's"),
    ok("tolerated clock", "clock", "300 s ahead of the hub, which it tolerates", hub=hub(clock_offset_s=-300.0)),
    skipped("no clock", "clock", "the hub's is not known", hub=hub(clock_offset_s=None)),
    *(
        problem(
            f"wrong clock of {platform}",
            "clock",
            f"412 s {where} the hub",
            f"set this machine's clock (the hub refuses signatures older than 300 s): {command}",
            hub=hub(clock_offset_s=offset_s),
            platform=platform,
        )
        for platform, offset_s, where, command in (
            ("linux", 412.0, "behind", "sudo timedatectl set-ntp true"),
            ("darwin", -412.0, "ahead of", "sudo sntp -sS time.apple.com"),
        )
    ),
    # ── The device: what the hub's 401 and 403 mean ──
    ok("connected", "device", "connected to alice since 2026-11-02"),
    ok("connected, no list", "device", "connected to alice", device=replace(DEVICE, since=None, scopes=None)),
    problem(
        "may not run",
        "device",
        "connected to alice since 2026-11-02, but may not run models, may do: models:push",
        f"tick inference for this device on {PAGE}",
        device=replace(DEVICE, scopes=("models:push",), may_run=False),
    ),
    problem("unbound", "device", "not connected to any account of hub.test", "corral signin", device=UNKNOWN, saved_hub=""),
    problem(
        "revoked",
        "device",
        "no longer connected to hub.test: signed out, revoked, or the key file is another one",
        "corral signin",
        device=UNKNOWN,
    ),
    problem(
        "wrong hub by CORRAL_HUB",
        "device",
        "not connected to hub.test; the last sign-in was to other.test",
        "unset CORRAL_HUB to go back there, or connect here as well: corral signin",
        device=UNKNOWN,
        saved_hub="https://other.test",
    ),
    problem(
        "wrong hub by --hub",
        "device",
        "not connected to hub.test; the last sign-in was to other.test",
        f"corral signin --hub {HUB}",
        device=UNKNOWN,
        saved_hub="https://other.test",
        hub=hub(source="--hub"),
    ),
    problem(
        "wrong hub of the server",
        "device",
        "not connected to hub.test; the last sign-in was to other.test",
        "corral signin; to go back, restart the local server with CORRAL_HUB=https://other.test",
        device=UNKNOWN,
        saved_hub="https://other.test",
        hub=hub(source="the local server"),
    ),
    problem(
        "unbound at ollama.com",
        "device",
        "not connected to any account of ollama.com",
        "corral signin",
        hub=STOCK_HUB,
        server=NO_SERVER,
        device=Standing(status=200),
        saved_hub="",
        problems=2,
    ),
    problem(
        "account disabled",
        "device",
        "hub.test knows this device and refuses it: its account is disabled",
        "ask an administrator of the hub: corral hub user enable NAME",
        device=NO_LINK,
    ),
    problem(
        "forbidden",
        "device",
        "hub.test refuses signed requests: use https",
        "ask whoever runs the hub, with these words",
        device=Standing(status=403, message="use https"),
    ),
    problem(
        "rate limited",
        "device",
        "hub.test was asked too often",
        "wait a minute, and run corral doctor again",
        device=Standing(status=429),
    ),
    problem(
        "hub in trouble",
        "device",
        "hub.test answered 503: temporarily unavailable",
        "the hub's log says why: ask whoever runs it",
        device=Standing(status=503, message="temporarily unavailable"),
    ),
    skipped(
        "not known which",
        "hub",
        "none was named, and what was chosen cannot be read",
        hub=replace(STOCK_HUB, is_asked=False),
        memory_trouble=Trouble("it is damaged"),
    ),
    problem(
        "no hub but a web server",
        "device",
        "hub.test answered 501 when asked who this is",
        "is that a hub? check CORRAL_HUB",
        device=Standing(status=501),
    ),
    problem(
        "no hub at all",
        "device",
        "hub.test answered 404 when asked who this is",
        "is that a hub? check CORRAL_HUB",
        device=Standing(status=404),
        hub=hub(is_corral=False),
    ),
    problem(
        "downgraded",
        "device",
        "no longer takes it",
        "corral signin",
        device=Standing(trouble=Trouble("no longer takes it", "corral signin")),
    ),
    skipped(
        "key is enough",
        "device",
        "not connected to hub.test; commands use OLLAMA_API_KEY",
        device=UNKNOWN,
        api_key=KEY,
        server=NO_SERVER,
        saved_hub="",
    ),
    skipped("stock hub and wrong clock", "device", "not asked: the hub would refuse this clock", device=None),
    # ── The relay ──
    ok("same key", "relay", "the local server signs with this key"),
    skipped("no server", "relay", "no local server answers", server=NO_SERVER),
    skipped("not asked", "relay", "not asked: this device comes first", server=server(standing=None)),
    problem(
        "another user's key",
        "relay",
        f"the local server, run by ollama, signs with another key {OTHER}, which is not connected",
        "sudo -u ollama -H corral signin",
        server=server(user="ollama", standing=Standing(status=401, has_link=True, fingerprint=OTHER)),
    ),
    problem(
        "another home's key",
        "relay",
        f"the local server signs with another key {OTHER}, which is not connected",
        "restart the local server with this home folder: corral serve",
        server=relayed(status=401, has_link=True, fingerprint=OTHER),
    ),
    *(
        ok(
            name,
            "relay",
            f"{GUEST.url}: {said}",
            server=replace(GUEST, **changes),
            hub=replace(STOCK_HUB, trouble=Trouble("gone")),
            device=None,
            saved_hub="",
        )
        for name, said, changes in (
            ("guest of a machine", "this device is let in, its hub is https://ollama.com", {}),
            ("guest by a key", "OLLAMA_API_KEY is taken, its hub is https://ollama.com", {"took_key": True}),
            (
                "open machine",
                "it asks for nothing, its hub is https://other.test",
                {"is_let_in": False, "hub": "https://other.test"},
            ),
            ("machine without a cloud", "this device is let in, its cloud models are switched off", {"cloud_off_by": "env"}),
            ("guest of a user", "this device is let in, its hub is https://ollama.com", {"is_here": True, "user": "ollama"}),
            ("guest of another home", "this device is let in, its hub is https://ollama.com", {"is_here": True}),
            (
                "machine of bob",
                "this device is let in, it runs cloud models as bob",
                {"standing": Standing(status=200, account="bob")},
            ),
            (
                "another machine's key",
                "this device is let in, its hub is https://ollama.com",
                {"standing": Standing(status=401, has_link=True, fingerprint=OTHER)},
            ),
            ("another version there", "this device is let in, its hub is https://ollama.com", {"corral": "0.0.9"}),
        )
    ),
    skipped(
        "guest and ollama.com",
        "device",
        "not connected to ollama.com, which nobody chose",
        server=GUEST,
        hub=STOCK_HUB,
        device=UNKNOWN,
        saved_hub="",
    ),
    ok(
        "own secured server",
        "relay",
        "the local server signs with this key",
        server=server(is_let_in=True),
        authorized=AuthorizedSeen(path="~/k", keys=1),
    ),
    skipped(
        "wrong hub",
        "relay",
        "not asked: the hub comes first",
        server=server(hub="https://other.test"),
        hub=hub(trouble=Trouble("it is a local server")),
    ),
    skipped(
        "secured, no key to sign with",
        "relay",
        "not known: there is no usable key",
        server=ServerSeen(url=LOCAL, status=401),
        is_signing=True,
        key=key_file(fingerprint=""),
        device=None,
    ),
    skipped(
        "another hub than the default",
        "relay",
        "the local server uses the hub https://other.test",
        server=server(hub="https://other.test"),
        hub=STOCK_HUB,
    ),
    problem(
        "another account",
        "relay",
        "the local server, run by ollama, runs cloud models as bob (box), this command acts as alice",
        "run it as yourself: corral serve",
        server=server(user="ollama", standing=Standing(status=200, account="bob", device_id="d2", device_name="box")),
    ),
    ok(
        "another key of the account",
        "relay",
        "the local server runs cloud models as alice, by another key (box)",
        server=relayed(status=200, account="alice", device_id="d2", device_name="box"),
    ),
    ok(
        "stock server and hub",
        "relay",
        "the local server runs cloud models as alice",
        server=server(corral="", hub="", standing=Standing(status=200, account="alice")),
        hub=STOCK_HUB,
        device=Standing(status=200, account="alice"),
    ),
    problem(
        "same key, refused",
        "relay",
        "the local server is refused with this key, which is connected",
        RELAY,
        server=relayed(status=401, has_link=True, fingerprint=FINGERPRINT),
    ),
    problem(
        "another hub",
        "relay",
        "the local server uses the hub https://other.test",
        f"restart it with CORRAL_HUB={HUB}",
        server=server(hub="https://other.test", standing=None),
    ),
    skipped(
        "another hub, asked for",
        "relay",
        "the local server uses the hub https://other.test",
        server=server(hub="https://other.test", standing=None),
        hub=hub(source="--hub"),
    ),
    problem(
        "stock server",
        "relay",
        f"{LOCAL} is Ollama's server, whose cloud models run at ollama.com",
        "stop it and run corral serve instead, or give that one another OLLAMA_HOST",
        server=server(corral="", hub="", standing=None),
    ),
    problem(
        "OLLAMA_HOST is a hub",
        "relay",
        f"OLLAMA_HOST names {LOCAL}, which is a hub and asks for a credential",
        f"unset OLLAMA_HOST, and name the hub by CORRAL_HUB={LOCAL}",
        server=server(is_hub=True, standing=None),
    ),
    ok(
        "OLLAMA_HOST is a hub, with a key",
        "relay",
        f"OLLAMA_HOST names a hub, {LOCAL}, which is asked with OLLAMA_API_KEY",
        server=server(is_hub=True, standing=None),
        api_key=KEY,
    ),
    problem(
        "secured",
        "relay",
        f"{LOCAL} asks for a credential",
        "put its key into OLLAMA_API_KEY, or set OLLAMA_AUTH=1 to sign",
        server=ServerSeen(url=LOCAL, status=401),
    ),
    problem(
        "secured, wrong key",
        "relay",
        f"{LOCAL} does not take OLLAMA_API_KEY",
        "make one there: corral authorize key NAME",
        server=ServerSeen(url=LOCAL, status=401),
        api_key=KEY,
    ),
    problem(
        "secured, unknown device",
        "relay",
        f"{LOCAL} does not know this device's key",
        "let it in there: corral authorize add --name NAME KEY, the KEY in ~/.ollama/id_ed25519.pub",
        server=ServerSeen(url=LOCAL, status=401),
        is_signing=True,
    ),
    problem(
        "secured, plain http",
        "relay",
        "http://box:11434 asks for a credential",
        "set OLLAMA_AUTH=1 to sign; over plain http it gets no API key",
        server=ServerSeen(url="http://box:11434", is_here=False, status=401),
        api_key=KEY,
    ),
    skipped("no right to the account", "relay", "not told: no cloud", server=relayed(status=403, message="no cloud")),
    problem(
        "server cannot tell",
        "relay",
        "the local server cannot tell who it is: it answered 429",
        RELAY,
        server=relayed(status=429),
    ),
    problem("server says why", "relay", "no route", RELAY, server=relayed(trouble=Trouble("no route"))),
    problem(
        "switched off",
        "relay",
        "cloud models are switched off by OLLAMA_NO_CLOUD",
        "unset OLLAMA_NO_CLOUD and restart the local server",
        server=server(cloud_off_by="env", standing=None),
    ),
    problem(
        "switched off by the desktop's file",
        "relay",
        "cloud models are switched off by ~/.ollama/server.json",
        "take disable_ollama_cloud out of that file",
        server=server(cloud_off_by="config", standing=None),
    ),
    skipped(
        "switched off on purpose",
        "relay",
        "cloud models are switched off by OLLAMA_NO_CLOUD",
        server=NO_SERVER,
        is_cloud_off_here=True,
        hub=replace(STOCK_HUB, is_asked=False),
    ),
    # ── The API key ──
    skipped("no key", "OLLAMA_API_KEY", "not set"),
    ok("valid", "OLLAMA_API_KEY", "crlk_9fK2…  valid · inference · expires in 12 days", api_key=KEY),
    ok(
        "valid for ever",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  valid · inference · does not expire",
        api_key=replace(KEY, expires_at=None),
    ),
    ok("valid, no list", "OLLAMA_API_KEY", "crlk_9fK2…  valid", api_key=replace(KEY, is_listed=None, scopes=None)),
    problem(
        "no scope",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  valid · models:push · does not expire · runs no models",
        "use one with the scope inference: corral keys create NAME --scope inference",
        api_key=replace(
            KEY, scopes=("models:push",), expires_at=None, standing=Standing(status=200, account="alice", may_run=False)
        ),
    ),
    problem(
        "another account's",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  valid, but of bob, while this device is alice's",
        "unset OLLAMA_API_KEY",
        api_key=replace(KEY, standing=Standing(status=200, account="bob", may_run=True)),
    ),
    problem(
        "revoked key",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  revoked on 2026-11-19",
        ANOTHER,
        api_key=replace(REFUSED_KEY, revoked_at=NOW - timedelta(days=1)),
    ),
    problem(
        "expired key",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  expired on 2026-11-18",
        ANOTHER,
        api_key=replace(REFUSED_KEY, expires_at=NOW - timedelta(days=2)),
    ),
    problem(
        "unknown key",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  refused by hub.test: no key of alice",
        ANOTHER,
        api_key=replace(REFUSED_KEY, is_listed=False),
    ),
    problem(
        "refused key",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  refused by hub.test: revoked, expired, or of another hub",
        ANOTHER,
        api_key=replace(REFUSED_KEY, is_listed=None),
    ),
    problem(
        "no key's text",
        "OLLAMA_API_KEY",
        "set, but it is cut off: 30 of 53 characters",
        f"take one from {PAGE}, or unset OLLAMA_API_KEY",
        api_key=ApiKeySeen(fault="is cut off: 30 of 53 characters"),
    ),
    problem(
        "key at a stock hub",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  is of a Corral hub, and ollama.com is none",
        "set CORRAL_HUB to the hub that made it",
        api_key=ApiKeySeen(prefix="crlk_9fK2"),
        hub=STOCK_HUB,
        server=server(hub="https://ollama.com"),
        device=Standing(status=200, account="alice", device_id="d1"),
    ),
    ok(
        "key of the server",
        "OLLAMA_API_KEY",
        f"crlk_9fK2…  taken by {LOCAL}",
        api_key=ApiKeySeen(prefix="crlk_9fK2"),
        server=server(took_key=True),
    ),
    skipped(
        "key not tried",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  not tried",
        api_key=ApiKeySeen(prefix="crlk_9fK2"),
        hub=hub(trouble=Trouble("gone")),
        device=None,
    ),
    problem(
        "key answered oddly",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  hub.test answered 503: later",
        "the hub's log says why: ask whoever runs it",
        api_key=replace(KEY, standing=Standing(status=503, message="later")),
    ),
    problem(
        "key not sent",
        "OLLAMA_API_KEY",
        "crlk_9fK2…  no answer",
        "check CORRAL_HUB",
        api_key=replace(KEY, standing=Standing(trouble=Trouble("no answer"))),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_finding_says_what_is_so_and_the_one_thing_to_do(case: Case) -> None:
    found = findings(replace(SEEN, **case.changes), checks=EVERYTHING)
    row = next(finding for finding in found if finding.check == case.check)
    assert row == Finding(check=case.check, status=case.status, detail=case.detail, fix=case.fix)  # type: ignore[arg-type]
    if case.problems >= 0:
        problems = [finding for finding in found if finding.status == "problem"]
        assert len(problems) == case.problems, problems


def test_every_problem_has_a_fix_and_nothing_else_has() -> None:
    for case in CASES:
        for finding in findings(replace(SEEN, **case.changes), checks=EVERYTHING):
            assert bool(finding.fix) == (finding.status == "problem"), (case.name, finding)


def test_guest_of_another_machine_has_no_problem_with_its_hub() -> None:
    gone = replace(STOCK_HUB, trouble=Trouble("gone"))
    for key in (SEEN.key, key_file(fingerprint="")):
        seen = replace(SEEN, server=GUEST, hub=gone, device=None, saved_hub="", models=None, engine=None, key=key)
        assert [finding for finding in findings(seen, checks=EVERYTHING) if finding.status == "problem"] == []


def test_nothing_is_found_where_all_is_well() -> None:
    found = findings(SEEN, checks=EVERYTHING)
    assert [finding for finding in found if finding.status == "problem"] == []
    # Rows that have nothing to say are left out.
    assert not {"settings", "authorized_keys", "proxy", "corral.json"} & {finding.check for finding in found}
