"""keys and devices: what may act for the signed-in account, managed through the hub's API.

Requests carry this device's strong signature, or OLLAMA_API_KEY (with the scope `keys`) where no device is connected. A secret is
printed alone on standard output, once; everything said about it goes to standard error.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from corral.cli import render
from corral.cli.command import HUB_VARIABLES, command
from corral.cli.context import Decorated, Environment, Failed, hub_option, json_option, pass_environment, wait_for
from corral.cli.hub_access import HubAccess, hub_access
from corral.cli.scopes import SCOPES_EPILOG, scope_names, scope_option, shown_scopes
from corral.core.scopes import format_scope_names

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_KEY_HEADINGS = ("ID", "NAME", "KEY", "SCOPES", "LAST USED", "EXPIRES")
_DEVICE_HEADINGS = ("ID", "NAME", "FINGERPRINT", "SCOPES", "LAST USED")


@command("list", variables=HUB_VARIABLES)
@click.option("--all", "everything", is_flag=True, help="Show revoked and expired keys as well.")
@hub_option
@json_option
@pass_environment
def keys_list(environment: Environment, everything: bool, hub_url: str, as_json: bool) -> None:
    """List your API keys. Secrets are not shown; the hub does not have them."""
    keys = _ask(environment, hub_url, "GET", "/api/keys")
    if as_json:
        sys.stdout.write(render.as_json(keys))
        return
    sys.stdout.write(keys_table(keys, datetime.now(UTC), everything=everything))


#: For parse_expiry. Keys live until they are revoked unless told otherwise, as ollama.com's do (M7); only the form of the page
#: begins with an end (security.md 3).
expires_option = click.option(
    "--expires", default="never", metavar="WHEN", help="12h, 30d, 2w, a date, or never. [default: never]"
)


def key_options(create: Decorated) -> Decorated:
    """NAME or `--name NAME`, `--scope` and `--expires`, alike for one's own keys and for somebody else's."""
    options = (
        click.argument("name", required=False, default=""),
        click.option("--name", "name_option", default="", metavar="NAME", help="What uses the key, if it is not said before."),
        scope_option(("inference",)),
        expires_option,
    )
    for option in reversed(options):
        create = option(create)
    return create


@command("create", variables=HUB_VARIABLES, epilog=SCOPES_EPILOG)
@key_options
@hub_option
@pass_environment
def keys_create(
    environment: Environment, name: str, name_option: str, scopes: tuple[str, ...], expires: str, hub_url: str
) -> None:
    """Create an API key called NAME and print its secret to standard output, once."""
    expires_at = parse_expiry(expires, datetime.now(UTC))
    name = key_name(name, name_option, example="corral keys create ci")
    body = {"name": name, "scopes": scope_names(scopes or ("inference",)), "expires_at": expires_at and expires_at.isoformat()}

    async def create() -> None:
        async with hub_access(environment, hub_url) as access:
            key = await access.ask("POST", "/api/keys", body)
            account = await _account_name(access)
            show_new_key(key, account=account, others=await _keys_if_told(access))

    wait_for(create())


@command("rotate", variables=HUB_VARIABLES)
@click.argument("key")
@click.option("--overlap", type=click.Choice(["0", "1h", "24h", "7d"]), default="0", help="How long the old key lives on.")
@hub_option
@pass_environment
def keys_rotate(environment: Environment, key: str, overlap: str, hub_url: str) -> None:
    """Replace a KEY (its id or name) by a new one with the same name and scopes; print the new secret."""

    async def rotate() -> None:
        async with hub_access(environment, hub_url) as access:
            old = pick(await access.ask("GET", "/api/keys"), key, what="API key", listing="corral keys list")
            new = await access.ask("POST", f"/api/keys/{old['id']}/rotate", {"overlap": overlap})
            show_new_key(new, account=await _account_name(access))
            rest = "no longer works" if overlap == "0" else f"works for another {overlap}"
            render.say(f"The old one ({render.plain(old['prefix'])}…) {rest}.")

    wait_for(rotate())


@command("revoke", variables=HUB_VARIABLES)
@click.argument("key")
@hub_option
@pass_environment
def keys_revoke(environment: Environment, key: str, hub_url: str) -> None:
    """Revoke a KEY (its id or name): the next request with it is refused."""

    async def revoke() -> None:
        async with hub_access(environment, hub_url) as access:
            found = pick(await access.ask("GET", "/api/keys"), key, what="API key", listing="corral keys list")
            await access.ask("DELETE", f"/api/keys/{found['id']}")
            render.say(f'Revoked "{render.plain(found["name"])}" ({render.plain(found["prefix"])}…).')

    wait_for(revoke())


@command("list", variables=HUB_VARIABLES)
@hub_option
@json_option
@pass_environment
def devices_list(environment: Environment, hub_url: str, as_json: bool) -> None:
    """List the devices connected to your account."""
    devices = _ask(environment, hub_url, "GET", "/api/user/keys")
    if as_json:
        sys.stdout.write(render.as_json(devices))
        return
    sys.stdout.write(devices_table(devices, datetime.now(UTC), width=render.terminal_width()))


@command("revoke", variables=HUB_VARIABLES)
@click.argument("device")
@hub_option
@pass_environment
def devices_revoke(environment: Environment, device: str, hub_url: str) -> None:
    """Disconnect a DEVICE (its id, name or fingerprint): its next request is refused."""
    from corral.wire.signing import parse_authorized_key

    async def revoke() -> None:
        async with hub_access(environment, hub_url) as access:
            found = pick(await access.ask("GET", "/api/user/keys"), device, what="device", listing="corral devices list")
            await access.ask("DELETE", f"/api/user/keys/{parse_authorized_key(found['key']).encoded}")
            render.say(f'Disconnected "{render.plain(found["name"])}" ({found["fingerprint"]}).')

    wait_for(revoke())


@command("scope", variables=HUB_VARIABLES, epilog=SCOPES_EPILOG)
@click.argument("device")
@click.argument("scopes", nargs=-1, required=True, metavar="SCOPE...", shell_complete=shown_scopes)
@hub_option
@pass_environment
def devices_scope(environment: Environment, device: str, scopes: tuple[str, ...], hub_url: str) -> None:
    """Say all that a DEVICE (its id, name or fingerprint) may do, from its next request on.

    SCOPE is a scope, once or more, or the word none.
    """
    from corral.wire.signing import parse_authorized_key

    wanted = [] if scopes == ("none",) else scope_names(scopes)

    async def change() -> None:
        async with hub_access(environment, hub_url) as access:
            found = pick(await access.ask("GET", "/api/user/keys"), device, what="device", listing="corral devices list")
            path = f"/api/user/keys/{parse_authorized_key(found['key']).encoded}"
            changed = await access.ask("PATCH", path, {"scopes": wanted})
            render.say(scopes_sentence(changed["name"], changed["scopes"]))

    wait_for(change())


def scopes_sentence(name: str, scopes: Sequence[str]) -> str:
    """What is said of a device whose scopes were changed."""
    return f'"{render.plain(name)}" may: {format_scope_names(scopes) if scopes else "nothing but say who it is"}.'


def _ask(environment: Environment, hub_url: str, method: str, path: str) -> Any:
    async def ask() -> Any:
        async with hub_access(environment, hub_url) as access:
            return await access.ask(method, path)

    return wait_for(ask())


async def _account_name(access: HubAccess) -> str:
    try:
        return str((await access.ask("POST", "/api/me"))["name"])
    except Failed:
        return ""  # the key exists and must be shown; whose it is, is an aside


async def _keys_if_told(access: HubAccess) -> Sequence[Mapping[str, Any]]:
    """The account's keys, for an aside; none when the hub does not tell."""
    try:
        keys = await access.ask("GET", "/api/keys")
    except Failed:
        return ()
    return keys if isinstance(keys, list) else ()


def key_name(name: str, option: str, *, example: str) -> str:
    """What a key is called, by its argument or by `--name`. Raises: Failed for neither, and for two."""
    if bool(name) == bool(option):
        raise Failed("name the key, once, after what uses it", example, status=2)
    return name or option


def show_new_key(key: Mapping[str, Any], *, account: str, others: Sequence[Mapping[str, Any]] = ()) -> None:
    """The sentence to standard error, then the secret alone to standard output. others: keys of the account, among which those of
    the same name are pointed out."""
    now = datetime.now(UTC)
    same = [other for other in others if other["name"] == key["name"] and other["id"] != key["id"] and _life(other, now)[1]]
    if same:
        ids = ", ".join(other["id"] for other in same)
        render.say(f'There is another key named "{render.plain(key["name"])}" ({ids}); this one has the id {key["id"]}.')
    whose = f" for {render.plain(account)}" if account else ""
    expires = render.parse_time(key.get("expires_at") or "")
    life = f"expires {expires:%Y-%m-%d}" if expires else "does not expire"
    render.say(f'Key "{render.plain(key["name"])}"{whose} · {_scopes_of(key)} · {life}. It is shown once:')
    print(key["key"], flush=True)


def pick(entries: Sequence[Mapping[str, Any]], wanted: str, *, what: str, listing: str) -> Mapping[str, Any]:
    """The one live entry with that id, name or fingerprint. listing: the command that shows what there is.
    Raises: Failed when there is none, or several of that name."""
    live = [entry for entry in entries if not entry.get("revoked_at")]
    found = [entry for entry in live if wanted in (entry["id"], entry.get("fingerprint"))]
    found = found or [entry for entry in live if entry["name"] == wanted]
    if not found:
        raise Failed(f'there is no {what} "{wanted}"', listing)
    if len(found) > 1:
        raise Failed(f'{len(found)} of them are named "{wanted}"', f"use an id: {', '.join(entry['id'] for entry in found)}")
    return found[0]


def parse_expiry(text: str, now: datetime) -> datetime | None:
    """`never`, `90d`, `12h`, `2w` or an ISO date as an aware time. Raises: Failed for anything else and for the past."""
    if text == "never":
        return None
    if match := re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text):
        return now + int(match[1]) * _UNITS[match[2]]
    when = render.parse_time(text)
    if when is None:
        raise Failed(f"--expires takes 90d, 12h, 2w, a date such as 2027-01-31, or never; not {text!r}", status=2)
    if when <= now:
        raise Failed(f"{text} is in the past", status=2)
    return when


def keys_table(keys: Sequence[Mapping[str, Any]], now: datetime, *, everything: bool) -> str:
    """API keys as a table; those that no longer work only on request."""
    lives = [(key, *_life(key, now)) for key in keys]
    return render.table(_KEY_HEADINGS, [_key_row(key, life, now) for key, life, works in lives if works or everything])


def _key_row(key: Mapping[str, Any], life: str, now: datetime) -> tuple[str, ...]:
    used = render.relative_time(render.parse_time(key.get("last_used_at") or ""), now)
    return key["id"], key["name"], f"{key['prefix']}…", _scopes_of(key), used, life


def _life(key: Mapping[str, Any], now: datetime) -> tuple[str, bool]:
    """(what EXPIRES shows, whether the key works)."""
    revoked, expires = (render.parse_time(key.get(name) or "") for name in ("revoked_at", "expires_at"))
    if revoked:
        return f"revoked {render.relative_time(revoked, now)}", False
    if expires and expires <= now:
        return f"expired {render.relative_time(expires, now)}", False
    return (render.relative_time(expires, now) if expires else "Never"), True


def devices_table(devices: Sequence[Mapping[str, Any]], now: datetime, *, width: int = 0) -> str:
    """Devices as a table; the one that asks is marked. width: of the terminal, 0 for none."""
    full = [_device_row(device, device["fingerprint"], now) for device in devices]
    short = [_device_row(device, _short(device["fingerprint"]), now) for device in devices]
    return render.fitting_table(_DEVICE_HEADINGS, full, short, width=width)


def _device_row(device: Mapping[str, Any], fingerprint: str, now: datetime) -> tuple[str, ...]:
    name = f"{device['name']} (this one)" if device.get("current") else device["name"]
    used = render.relative_time(render.parse_time(device.get("last_used_at") or ""), now)
    where = f" from {device['last_network']}" if device.get("last_network") and device.get("last_used_at") else ""
    return device["id"], name, fingerprint, _scopes_of(device), used + where


def _scopes_of(entry: Mapping[str, Any]) -> str:
    return format_scope_names(entry["scopes"])


def _short(fingerprint: str) -> str:
    """`SHA256:lbms…Sspg`, as the hub's pages have it: tells one's devices apart, and is too little to trust one by."""
    return f"{fingerprint[:11]}…{fingerprint[-4:]}"
