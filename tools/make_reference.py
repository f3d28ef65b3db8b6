"""Makes docs/reference.md from the code: every command with its options, every route with what it demands, every setting.

`make reference` rewrites the page; tests/test_docs.py fails when it is not what the code says. Only the sentences about settings
are written here, since the code has no place for them; a variable without one is an error.
"""

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import click

from corral.cli.app import root
from corral.edges.asgi import Endpoint
from corral.main.hub import build_hub
from corral.main.local import build_local
from corral.main.shared import Built
from corral.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reference.md"

#: variable -> (default, meaning). Every variable that settings.py reads, in the order of the page.
SETTINGS = {
    "OLLAMA_HOST": ("`127.0.0.1:11434`", "Where the local server listens, and where commands look for it."),
    "OLLAMA_MODELS": ("`~/.ollama/models`", "Installed models, in Ollama's own layout."),
    "OLLAMA_KEEP_ALIVE": ("`5m`", "How long a model stays loaded after its last request; below 0 for ever, 0 not at all."),
    "OLLAMA_LOAD_TIMEOUT": ("`5m`", "How long loading a model may stand still; 0 or below: for ever."),
    "OLLAMA_CONTEXT_LENGTH": (
        "`0`",
        "Tokens a model may look back, where neither it nor a request says; 0: 4096, 32768 from 23 GiB and 262144 from 47 GiB of "
        "accelerators' memory on; never more than the model was trained for.",
    ),
    "OLLAMA_NUM_PARALLEL": (
        "`0`",
        "Requests one loaded model answers at the same time; 0: four, fewer where memory does not allow.",
    ),
    "OLLAMA_MAX_LOADED_MODELS": ("`0`", "Models loaded at the same time; 0: three for each accelerator, three without."),
    "OLLAMA_MAX_QUEUE": ("`512`", "Requests that may wait for a model or for one of its slots; more are answered 503."),
    "OLLAMA_ORIGINS": ("", "Further web origins that may call the local server, comma-separated."),
    "OLLAMA_NO_CLOUD": ("`0`", "Refuse everything that would go to a hub."),
    "OLLAMA_REMOTES": (
        "the hub in use",
        "Hosts at which models that were installed as stubs may run, comma-separated: `box` is all its ports, `box:11434` one. "
        "Requests to others than the hub are not signed.",
    ),
    "OLLAMA_CLOUD_BASE_URL": ("", "The hub to use, where `CORRAL_HUB` does not say; ignored unless https or on this machine."),
    "OLLAMA_AUTH": ("`0`", "Sign every request of a command to `OLLAMA_HOST` with this device's key, for proxies that check it."),
    "OLLAMA_DEBUG_LOG_REQUESTS": (
        "`0`",
        "Write the body of every request that runs a model, and a script that repeats it, to a directory that the log names.",
    ),
    "OLLAMA_EDITOR": ("`VISUAL`, then `EDITOR`", "The editor for a prompt, opened with Ctrl-G."),
    "OLLAMA_FLASH_ATTENTION": ("llama.cpp's choice", "Whether the engine uses flash attention."),
    "OLLAMA_KV_CACHE_TYPE": ("`f16`", "How the engine keeps what it has read: `q8_0` and `q4_0` take less memory."),
    "OLLAMA_GPU_OVERHEAD": ("`0`", "Bytes of each accelerator's memory that models leave alone."),
    "HTTP_PROXY": ("", "Read, and of no use: plain http goes directly. Also in lower case, as the next two."),
    "HTTPS_PROXY": ("", "A proxy for https to other machines: hubs, registries, `OLLAMA_HOST`."),
    "NO_PROXY": ("", "Hosts, domains, addresses and networks that are reached without a proxy; this machine always is."),
    "OLLAMA_NOHISTORY": ("`0`", "Keep no history of interactive prompts."),
    "OLLAMA_NOPRUNE": ("`0`", "Keep blobs that no model needs, at the start of the server and when a model is replaced."),
    "OLLAMA_GO_TEMPLATE": (
        "the better one",
        "Whether a model's own `TEMPLATE` makes its prompts (`1`) or the template inside its weights (`0`), where it has both.",
    ),
    "OLLAMA_DEBUG": ("`0`", "1 or 2: log more."),
    "OLLAMA_API_KEY": ("", "An API key for the hub, used by commands instead of this device's signature."),
    "CORRAL_HUB": (
        "what `corral signin --hub` saved",
        "The hub that commands and the local server use. `https://ollama.com` when nothing says.",
    ),
    "CORRAL_HOME": ("`~/.corral`", "The hub's data: database, hosted models, secrets."),
    "CORRAL_HUB_LISTEN": ("`127.0.0.1:11435`", "Where the hub listens."),
    "CORRAL_PUBLIC_URL": (
        "`http://localhost:11435`",
        "How people and devices reach the hub; must be https when others can reach it.",
    ),
    "CORRAL_DATABASE_URL": ("SQLite in `CORRAL_HOME`", "The hub's database."),
    "CORRAL_SIGNUP": ("`closed`", "`open`: anyone who reaches the hub may make an account."),
    "CORRAL_QUOTA": ("no limit", "How much each account's repositories may hold: `50GB`. The library has no limit."),
    "CORRAL_MAX_REPOSITORIES": ("1000", "How many repositories an account may have; 0 sets no limit. The library has none."),
    "CORRAL_SCRUB_DAYS": ("30", "How often the hub reads every blob again, to find what its disk has changed; 0 turns it off."),
    "CORRAL_MIRROR": (
        "",
        "What the hub fetches from other registries, keeps and serves to everybody, comma-separated: "
        "`library/*=https://registry.ollama.ai`. A path in the URL takes the namespace's place: `docker.io/*=https://host/`.",
    ),
    "CORRAL_SEARCH_URL": (
        "",
        "A SearXNG that answers web searches of the hub's accounts, with JSON switched on: `http://127.0.0.1:8888/search`.",
    ),
    "CORRAL_WEB_FETCH": ("`off`", "`on`: the hub fetches public web pages for its accounts."),
    "CORRAL_WEB_FETCH_NETWORKS": ("", "Internal networks that pages may be fetched from as well, comma-separated."),
    "CORRAL_LLAMA_SERVER": ("the embedded engine", "A `llama-server` program to use as the engine."),
    "CORRAL_LOCAL_AUTH": (
        "`off`",
        "Whom the local server asks for a credential: nobody; `remote`: all but programs of this machine; `on`: everybody.",
    ),
    "CORRAL_AUTHORIZED_KEYS": ("`~/.ollama/authorized_keys`", "Whose credentials a secured local server takes, and for what."),
    "CORRAL_ALLOW_PUBLIC": ("`0`", "Let a local server that asks for no credential listen where others can reach it."),
    "CORRAL_TRUSTED_PROXIES": (
        "",
        "Networks of reverse proxies whose forwarded headers are believed, comma-separated; needed for a public hub on loopback.",
    ),
    "HOME": ("", "The home directory; `USERPROFILE` where there is none."),
}
#: command -> what `--json` prints. Every command that has the option.
JSON_SHAPES = {
    "list": (
        "array",
        "name, model, modified_at, size, digest, details, capabilities; of a stub also remote_model, remote_host",
        "`GET /api/tags`, newest first",
    ),
    "ps": ("array", "name, model, size, digest, details, expires_at, size_vram, context_length", "`GET /api/ps`"),
    "show": (
        "object",
        "license, modelfile, parameters, template, system, details, model_info, capabilities, modified_at; where there are any "
        "messages, projector_info, tensors (`-v`), remote_model, remote_host, requires",
        "`POST /api/show`",
    ),
    "whoami": (
        "array of one",
        "id, name, email, plan and what else the hub tells; device where it knows it",
        "`POST /api/me`",
    ),
    "keys list": (
        "array",
        "id, name, prefix, scopes, created_at, expires_at, last_used_at, revoked_at",
        "`GET /api/keys`; those that no longer work too",
    ),
    "devices list": (
        "array",
        "id, name, fingerprint, key, scopes, created_at, last_used_at, last_network, current",
        "`GET /api/user/keys`",
    ),
    "hub user list": ("array", "id, name, email, is_admin, created_at, disabled_at, quota_bytes", "the hub's accounts"),
    "hub key list": ("array", "id, name, prefix, scopes, created_at, expires_at, last_used_at, revoked_at", "as `keys list`"),
    "hub device list": (
        "array",
        "id, name, fingerprint, key, scopes, created_at, last_used_at, last_network, current",
        "as `devices list`",
    ),
    "authorize list": (
        "array",
        "name, fingerprint, kind (`device`, `api-key`), rights, cloud, models, from, expires_at, line",
        "the lines of `authorized_keys` that count",
    ),
    "doctor": (
        "array",
        "check, status (`ok`, `problem`, `skipped`), detail, fix (null unless there is a problem)",
        "one object for each line of the report",
    ),
    "hub gc": ("object", "blobs, size_bytes, links, uploads, files and whatever else was counted; dry_run", ""),
    "hub backup": (
        "object",
        "file, created_at, version, revision, accounts, has_blobs, blobs, blob_bytes, database_bytes, size_bytes, damaged",
        "the archive that was written",
    ),
    "hub restore": (
        "object",
        "created_at, version, accounts, administrators, blobs, blob_bytes, missing_blobs, former, "
        "is_forgetful, taken_again (kind, subject, name, owner)",
        "what became of the backup",
    ),
    "hub scrub": (
        "object",
        "blobs, size_bytes, damaged, healed; hurt: digest, since, models of each blob that is damaged now",
        "",
    ),
}
_FOLDED = {"USERPROFILE", "VISUAL", "EDITOR"}


def page() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "",
        "Generated from the code by `make reference`; do not edit. [Concepts](concepts.md) explains the words.",
        "",
        "## Commands",
        "",
        "Exit status: 0 done, 1 the operation failed, 2 wrong usage or a setting that cannot be used, 130 stopped by Ctrl-C. "
        "Results go to standard output, everything said about them to standard error, escape codes only to a terminal. Flags may "
        "be written `--flag=true` and `--flag=false` as well. `corral completion` makes Tab complete all of this in bash, zsh "
        "and fish.",
        "",
        *_commands(),
        "## JSON",
        "",
        "`--json` prints what a table is made of, for programs: sizes in bytes, times in RFC 3339, nothing shortened, "
        "the names of fields as the servers have them. A list without entries is `[]`. Fields may be added later.",
        "",
        "| Command | Prints | Fields | From |",
        "|---|---|---|---|",
        *(f"| `corral {name}` | {kind} | {fields} | {source} |" for name, (kind, fields, source) in JSON_SHAPES.items()),
        "",
        "## Routes of the local server",
        "",
        *_routes(local_endpoints()),
        "",
        "## Routes of the hub",
        "",
        "*Demands*: `anyone`, or the proofs that are accepted, and the scope the credential must have.",
        "",
        *_routes(hub_endpoints()),
        "",
        "## Settings",
        "",
        "Environment variables, read once when a command starts. Ollama's own keep their names and meaning.",
        "",
        "| Variable | Default | Meaning |",
        "|---|---|---|",
        *_settings(),
        "",
    ]
    return "\n".join(parts)


def _commands() -> Iterator[str]:
    for path, command in walk(root, ()):
        if not isinstance(command, click.Group):
            yield f"### `{' '.join((path, *usage(command)))}`"
            yield ""
            yield " ".join((command.help or command.short_help or "").replace("\b", "").split())
            yield ""
            options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
            yield from (f"- `{_spelling(option)}`: {' '.join((option.help or '').split())}" for option in options)
            if options:
                yield ""


def walk(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    """(full name, command) of everything a person can type."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        yield " ".join(("corral", *path, name)), command
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))


def usage(command: click.Command) -> list[str]:
    """The arguments as a usage line has them."""
    words = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            word = (parameter.metavar or parameter.name or "").upper()
            name = f"{word.rstrip('….')}…" if parameter.nargs == -1 else word
            words.append(name if parameter.required else f"[{name}]")
    return words


def _spelling(option: click.Option) -> str:
    text = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return text
    return f"{text} {option.metavar or (option.name or '').upper()}"


def _routes(endpoints: list[Endpoint]) -> Iterator[str]:
    yield "| Route | Demands | |"
    yield "|---|---|---|"
    for row in sorted(endpoints, key=lambda row: (shape_of(row.path), sorted(row.methods))):
        methods = ",".join(sorted(row.methods))
        what = (row.handler.__doc__ or "").strip().split("\n\n")[0].split(" Raises:")[0]
        what = " ".join(what.split()).replace("|", "&#124;")
        yield f"| `{methods} {shape_of(row.path)}` | {_demands(row)} | {what} |"


def shape_of(path: str) -> str:
    """The path without what changes with every edit of a static file."""
    return re.sub(r"\.[0-9a-f]{12}\.", ".{hash}.", path)


def _demands(row: Endpoint) -> str:
    if row.access.is_public:
        return "anyone" + (f"; secured: `{row.access.right}`" if row.access.right else "")
    scope = f"; scope `{row.access.scope}`" if row.access.scope else ""
    return ", ".join(sorted(row.access.proofs)) + scope + ("; administrators" if row.access.is_admin_only else "")


def _settings() -> Iterator[str]:
    missing = variables() ^ set(SETTINGS)
    assert not missing, f"SETTINGS in tools/make_reference.py and settings.py disagree about {sorted(missing)}"
    yield from (f"| `{name}` | {default} | {meaning} |" for name, (default, meaning) in SETTINGS.items())


def variables() -> set[str]:
    """Every variable that settings.py reads."""
    text = (ROOT / "src/corral/settings.py").read_text()
    return set(re.findall(r'read\.\w+\(\s*"([A-Z_]+)"', text)) - _FOLDED


def hub_endpoints() -> list[Endpoint]:
    """The hub's whole route table."""
    return asyncio.run(_endpoints_of(build_hub))


def local_endpoints() -> list[Endpoint]:
    """The local server's whole route table."""
    return asyncio.run(_endpoints_of(build_local))


async def _endpoints_of(build: Callable[[Settings], AbstractAsyncContextManager[Built]]) -> list[Endpoint]:
    """A server is put together on an empty home, asked, and taken apart."""
    with tempfile.TemporaryDirectory() as home:
        async with build(Settings.from_env({"HOME": home})) as built:
            return list(built.app.endpoints)


def main() -> int:
    """Print the page, or write it where it belongs."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
