"""authorize: who may use this machine's local server, in the file that it reads. No hub is asked, and that server only
whether it asks for keys at all.

A new API key is printed alone on standard output, once; everything said about it goes to standard error.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import render
from corral.cli.command import command
from corral.cli.commands_keys import expires_option, key_name, parse_expiry
from corral.cli.context import Decorated, Environment, Failed, json_option, pass_environment

if TYPE_CHECKING:
    from corral.settings import Settings
    from corral.wire.authorized_keys import AuthorizedKey, Terms

_VARIABLES = ("CORRAL_AUTHORIZED_KEYS", "CORRAL_LOCAL_AUTH")
_HEADINGS = ("NAME", "RIGHTS", "MODELS", "FROM", "EXPIRES", "FINGERPRINT")
#: Long enough for a server that is alive on this machine.
_STATUS_TIMEOUT_S = 2.0
_RIGHTS = ("read", "use", "manage")


def terms_options(add: Decorated) -> Decorated:
    """What a key may do, alike for devices and API keys."""
    options = (
        click.option(
            "--rights", type=click.Choice(_RIGHTS), default="use", help="read: list and show; use: run, too; manage: all."
        ),
        click.option("--models", default="", metavar="PATTERNS", help='Only these, as "llama*,qwen3:*". [default: every model]'),
        click.option("--cloud", is_flag=True, help="Let it use hosted models with this machine's account."),
        click.option("--from", "networks", default="", metavar="NETWORKS", help="Only from there, as 192.168.0.0/16."),
        expires_option,
    )
    for option in reversed(options):
        add = option(add)
    return add


@command("add", variables=_VARIABLES)
@click.argument("key", nargs=-1, required=True)
@click.option("--name", default="", metavar="NAME", help="Who that is. [default: the key's comment]")
@terms_options
@pass_environment
def add(environment: Environment, /, key: tuple[str, ...], name: str, **wanted: Any) -> None:
    """Let a device in by its public KEY: "ssh-ed25519 AAAA…", or the file that holds it, such as id_ed25519.pub.

    On the device it is in ~/.ollama/id_ed25519.pub. There, OLLAMA_AUTH=1 makes corral and ollama sign with it.
    """
    from corral.main.authorizing import authorize_device

    settings = environment.settings
    entry = authorize_device(settings, _public_key(" ".join(key)), name=name, terms=_terms(wanted))
    render.say(f"Added {_sentence(entry)}")
    _say_whether_it_counts(settings)


@command("key", variables=_VARIABLES)
@click.argument("name", required=False, default="")
@click.option("--name", "name_option", default="", metavar="NAME", help="What uses the key, if it is not said before.")
@terms_options
@pass_environment
def key(environment: Environment, /, name: str, name_option: str, **wanted: Any) -> None:
    """Make an API key called NAME and print it, once and alone, on standard output. Programs send it from OLLAMA_API_KEY."""
    from corral.main.authorizing import authorize_new_key

    settings, terms = environment.settings, _terms(wanted)
    entry, secret = authorize_new_key(settings, name=key_name(name, name_option, example="corral authorize key ci"), terms=terms)
    _say_whether_it_counts(settings)
    render.say(f"Key {_sentence(entry)} It is shown once:")
    print(secret.reveal(), flush=True)


@command("list", variables=_VARIABLES)
@json_option
@pass_environment
def list_keys(environment: Environment, as_json: bool) -> None:
    """List who may use this machine's local server, and say which lines of the file grant nothing."""
    from corral.main.authorizing import authorized_keys

    settings = environment.settings
    keys = authorized_keys(settings)
    for complaint in keys.complaints:
        render.say(f"Warning: {settings.authorized_keys}: {complaint}")
    if as_json:
        sys.stdout.write(render.as_json([_object(entry) for entry in keys.entries]))
        return
    now = datetime.now(UTC)
    rows = [_row(entry, entry.fingerprint, now) for entry in keys.entries]
    short = [_row(entry, f"{entry.fingerprint[:11]}…{entry.fingerprint[-4:]}", now) for entry in keys.entries]
    sys.stdout.write(render.fitting_table(_HEADINGS, rows, short, width=render.terminal_width()))


@command("remove", variables=_VARIABLES)
@click.argument("key")
@pass_environment
def remove(environment: Environment, key: str) -> None:
    """Remove a KEY (its name or fingerprint): the next request with it is refused."""
    from corral.main.authorizing import withdraw

    entry = withdraw(environment.settings, key)
    render.say(f'Removed "{render.plain(entry.name)}" ({entry.fingerprint}).')


def _public_key(text: str) -> str:
    """The key itself, or what the file of that name holds. Raises: Failed."""
    if text.startswith(("ssh-", "key-")):
        return text
    path = Path(text)
    if not _is_file(path):
        if text.endswith(".pub"):
            raise Failed(f"there is no file {render.plain(text)}", "give the key itself, in quotes, or its file")
        return text
    lines = [line for line in path.read_text(errors="replace")[:10_000].splitlines() if line and not line.startswith("#")]
    if lines and lines[0].startswith("-----BEGIN"):
        raise Failed(f"{text} is a private key, which belongs to nobody else", f"give the public one: {text}.pub")
    if len(lines) != 1:
        raise Failed(f"{text} does not hold one public key", "give the line of one, in quotes")
    return lines[0]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text that is too long for a name
        return False


def _terms(wanted: dict[str, Any]) -> "Terms":
    """Raises: Failed, BadRequest."""
    from corral.wire.authorized_keys import parse_terms

    return parse_terms(
        right=wanted["rights"],
        models=wanted["models"],
        networks=wanted["networks"],
        expires_at=parse_expiry(wanted["expires"], datetime.now(UTC)),
        has_cloud=wanted["cloud"],
    )


def _sentence(entry: "AuthorizedKey") -> str:
    """`"ada" · use · llama* · expires 2027-01-31.`"""
    terms = entry.terms
    parts = [f'"{render.plain(entry.name)}"', _rights(entry), ", ".join(terms.models) or "every model"]
    parts += [f"from {', '.join(map(str, terms.networks))}"] if terms.networks else []
    parts.append(f"expires {terms.expires_at:%Y-%m-%d %H:%M} UTC" if terms.expires_at else "does not expire")
    return f"{' · '.join(parts)}."


def _rights(entry: "AuthorizedKey") -> str:
    return f"{entry.terms.right}, cloud" if entry.terms.has_cloud else str(entry.terms.right)


def _row(entry: "AuthorizedKey", fingerprint: str, now: datetime) -> tuple[str, ...]:
    terms = entry.terms
    life = render.relative_time(terms.expires_at, now) if terms.expires_at else "Never"
    if terms.expires_at and terms.expires_at <= now:
        life = f"expired {life}"
    networks = ", ".join(map(str, terms.networks)) or "anywhere"
    return entry.name, _rights(entry), ", ".join(terms.models) or "all", networks, life, fingerprint


def _object(entry: "AuthorizedKey") -> dict[str, Any]:
    terms = entry.terms
    return {
        "name": entry.name,
        "fingerprint": entry.fingerprint,
        "kind": "device" if entry.key else "api-key",
        "rights": str(terms.right),
        "cloud": terms.has_cloud,
        "models": list(terms.models),
        "from": [str(network) for network in terms.networks],
        "expires_at": terms.expires_at.isoformat() if terms.expires_at else None,
        "line": entry.number,
    }


def _say_whether_it_counts(settings: "Settings") -> None:
    """What is still to be done before a server asks for the key. The setting is the server's, which this shell need not share."""
    if settings.local_auth != "off":
        return
    is_asking = _is_server_asking(settings)
    if is_asking is None:
        render.say("It counts where the server runs with CORRAL_LOCAL_AUTH=remote.")
    elif not is_asking:
        render.say("The server that runs here asks nobody for a key.\n→ restart it with CORRAL_LOCAL_AUTH=remote")


def _is_server_asking(settings: "Settings") -> bool | None:
    """Whether the server that runs here asks for keys; None where none runs here, or one that does not tell."""
    from corral.cli.api import LocalApi
    from corral.main.checkup import is_own_address

    if not (settings.local.is_loopback or is_own_address(settings.local.host)):
        return None
    return LocalApi(settings, timeout_s=_STATUS_TIMEOUT_S).is_asking()
