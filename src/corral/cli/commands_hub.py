"""hub user, key, device, host, quota, gc, rotate-keys and install: administration on the hub's own data, also while it runs.

These commands are for whoever may read CORRAL_HOME, which is why they ask for no password. They use the same services as the
hub's pages, so every change is audited (as `console`) and takes effect with the next request.
"""

import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from corral.cli import render
from corral.cli.command import command
from corral.cli.commands_keys import (
    devices_table,
    key_name,
    key_options,
    keys_table,
    parse_expiry,
    pick,
    scopes_sentence,
    show_new_key,
)
from corral.cli.context import Environment, Failed, json_option, pass_environment, pasted_secret, secret_from, wait_for
from corral.cli.scopes import SCOPES_EPILOG, scope_names, scope_option, shown_scopes
from corral.cli.starting import parse_model_option, parse_parameter_options
from corral.core.scopes import format_scope_names
from corral.wire.secrets import Secret, is_sendable

if TYPE_CHECKING:
    from corral.core.records import Account, ApiKey, Device, Scope
    from corral.main.services import HubServices

T = TypeVar("T")
_CONSOLE = "console"
#: What to do where there is no account of a name.
_USERS = "corral hub user list"
_HOME = ("CORRAL_HOME",)
_KEY_FIELDS = ("id", "name", "prefix", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at")
#: Fewer bytes than any model has: who gives such a number meant another unit.
_LEAST_QUOTA_BYTES = 1_000_000


def _with_hub(environment: Environment, work: Callable[["HubServices"], Awaitable[T]], *, unknown: str = _USERS) -> T:
    """Work on the hub's data. unknown: what to do where it has nothing of the name that was given. Raises: not_found where there
    is no hub; Failed."""
    from corral.main.services import open_existing_hub

    async def run() -> T:
        async with open_existing_hub(environment.settings) as hub:
            return await work(hub)

    return _known(run(), unknown=unknown)


def _known(work: Coroutine[Any, Any, T], *, unknown: str) -> T:
    from corral.wire.errors import CorralError

    try:
        return wait_for(work)
    except CorralError as error:
        if error.code != "not_found" or " → " in error.message:
            raise
        raise Failed(error.message, unknown) from error


async def _active(hub: "HubServices", user: str) -> "Account":
    """An account that may be given credentials. Raises: not_found; Failed for a disabled one."""
    account = await hub.accounts.named(user)
    if not account.is_active:
        raise Failed(f"{account.name} is disabled", f"corral hub user enable {account.name}")
    return account


# ── Accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@command("add", variables=_HOME)
@click.argument("name")
@click.option("--email", default="", help="The account's e-mail address.")
@click.option("--admin", is_flag=True, help="Make it an administrator.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@pass_environment
def user_add(environment: Environment, name: str, email: str, admin: bool, password_stdin: bool) -> None:
    """Create an account called NAME. Where there is no hub yet, this sets it up in CORRAL_HOME."""
    from corral.main.services import has_hub, open_hub_services, password_rule

    is_new = not has_hub(environment.settings)
    if not is_new:
        # A password is not asked for twice, only to say then that the name is taken.
        _with_hub(environment, lambda hub: hub.accounts.check_free(name, email=email))
    password = secret_from(password_stdin, prompt="Password", option="--password-stdin", confirm=True, rule=password_rule())

    async def add() -> "Account":
        async with open_hub_services(environment.settings) as hub:
            if is_new:
                render.say(f"Made a new hub in {render.plain(str(environment.settings.corral_home))}.")
            return await hub.accounts.add(name, email=email, password=password, is_admin=admin)

    account = wait_for(add())
    render.say(f"Created {account.name}{', an administrator' if account.is_admin else ''}.")


@command("list", variables=_HOME)
@json_option
@pass_environment
def user_list(environment: Environment, as_json: bool) -> None:
    """List the hub's accounts."""
    accounts = [account_object(account) for account in _with_hub(environment, lambda hub: hub.accounts.list())]
    if as_json:
        sys.stdout.write(render.as_json(accounts))
        return
    now = datetime.now(UTC)
    rows = [(row["name"], row["email"], _state(row), render.relative_time(_time(row["created_at"]), now)) for row in accounts]
    sys.stdout.write(render.table(("NAME", "EMAIL", "STATE", "CREATED"), rows))


@command("disable", variables=_HOME)
@click.argument("name")
@pass_environment
def user_disable(environment: Environment, name: str) -> None:
    """Lock an account out: its sessions end, its devices and keys are refused from the next request on."""
    account = _with_hub(environment, lambda hub: hub.accounts.set_disabled(name, True))
    render.say(f"Disabled {account.name}.")


@command("enable", variables=_HOME)
@click.argument("name")
@pass_environment
def user_enable(environment: Environment, name: str) -> None:
    """Let a disabled account in again, with the devices and keys it had."""
    account = _with_hub(environment, lambda hub: hub.accounts.set_disabled(name, False))
    render.say(f"Enabled {account.name}.")


@command("passwd", variables=_HOME)
@click.argument("name")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@pass_environment
def user_passwd(environment: Environment, name: str, password_stdin: bool) -> None:
    """Set an account's password. Its browser sessions end."""
    from corral.main.services import password_rule

    account = _with_hub(environment, lambda hub: hub.accounts.named(name))
    rule = password_rule()
    password = secret_from(password_stdin, prompt="New password", option="--password-stdin", confirm=True, rule=rule)
    _with_hub(environment, lambda hub: hub.accounts.set_password(account.name, password))
    render.say(f"Set the password of {account.name}.")


@command("promote", variables=_HOME)
@click.argument("name")
@pass_environment
def user_promote(environment: Environment, name: str) -> None:
    """Make an account an administrator."""
    account = _with_hub(environment, lambda hub: hub.accounts.promote(name))
    render.say(f"{account.name} is an administrator.")


@command("delete", variables=_HOME)
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask for the name once more.")
@pass_environment
def user_delete(environment: Environment, name: str, yes: bool) -> None:
    """Delete an account for good. Its sessions, devices, keys and models end at once; nobody can have its name again."""
    from corral.main.services import belongings_of

    if not yes:
        account, repositories = _known(belongings_of(environment.settings, name), unknown=_USERS)
        public = [repository.path for repository in repositories if repository.visibility == "public"]
        models = f"{len(repositories)} model{'' if len(repositories) == 1 else 's'}"
        shown = f"{models}, {len(public)} public: {', '.join(public)}" if public else models
        render.say(f"{account.name} goes for good, with {render.plain(shown)}.")
        _confirm(account.name)
    _with_hub(environment, lambda hub: hub.accounts.remove(name))
    render.say(f"Deleted {render.plain(name)}.")


def _confirm(name: str) -> None:
    """Have a name typed. Raises: Failed when another one is, or when there is no terminal."""
    if not sys.stdin.isatty():
        raise Failed(f"there is no terminal to confirm on that {name} shall be deleted", "add --yes", status=2)
    if click.prompt(f"Type {name} to delete it", default="", show_default=False, err=True).lower() != name.lower():
        raise Failed("that is not the name; nothing was deleted")


# ── API keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@command("create", variables=_HOME, epilog=SCOPES_EPILOG)
@click.argument("user")
@key_options
@pass_environment
def key_create(environment: Environment, user: str, name: str, name_option: str, scopes: tuple[str, ...], expires: str) -> None:
    """Create an API key called NAME for USER and print its secret, once and alone, on standard output."""
    name = key_name(name, name_option, example=f"corral hub key create {user} ci")
    wanted = parse_scopes(scopes or ("inference",))
    expires_at = parse_expiry(expires, datetime.now(UTC))

    async def create(hub: "HubServices") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        account = await _active(hub, user)
        key, secret = await hub.credentials.create_key(account, name=name, scopes=wanted, expires_at=expires_at, actor=_CONSOLE)
        return {**key_object(key), "key": secret.reveal()}, await _keys_of(hub, user)

    key, others = _with_hub(environment, create)
    show_new_key(key, account=user, others=others)


@command("list", variables=_HOME)
@click.argument("user")
@click.option("--all", "everything", is_flag=True, help="Show revoked and expired keys as well.")
@json_option
@pass_environment
def key_list(environment: Environment, user: str, everything: bool, as_json: bool) -> None:
    """List the API keys of USER."""
    keys = _with_hub(environment, lambda hub: _keys_of(hub, user))
    if as_json:
        sys.stdout.write(render.as_json(keys))
        return
    sys.stdout.write(keys_table(keys, datetime.now(UTC), everything=everything))


@command("revoke", variables=_HOME)
@click.argument("user")
@click.argument("key")
@pass_environment
def key_revoke(environment: Environment, user: str, key: str) -> None:
    """Revoke a KEY (its id or name) of USER: the next request with it is refused."""

    async def revoke(hub: "HubServices") -> str:
        found = pick(await _keys_of(hub, user), key, what="API key", listing=f"corral hub key list {user}")
        await hub.credentials.revoke_key(await hub.accounts.named(user), found["id"], actor=_CONSOLE)
        return str(found["name"])

    render.say(f'Revoked "{_with_hub(environment, revoke)}".')


async def _keys_of(hub: "HubServices", user: str) -> list[dict[str, Any]]:
    return [key_object(key) for key in await hub.credentials.keys_of(await hub.accounts.named(user))]


# ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@command("add", variables=_HOME, epilog=SCOPES_EPILOG)
@click.argument("user")
@click.option("--name", required=True, help="What the device is called.")
@click.option("--key", "public_key", required=True, metavar='"ssh-ed25519 AAAA…"', help="Its public key, as in id_ed25519.pub.")
@scope_option(("inference", "models:pull", "keys"))
@pass_environment
def device_add(environment: Environment, user: str, name: str, public_key: str, scopes: tuple[str, ...]) -> None:
    """Connect a device to USER without a browser."""
    from corral.core.policy import DEVICE_SCOPES
    from corral.core.records import Scope

    wanted = parse_scopes(scopes) if scopes else DEVICE_SCOPES - {Scope.PUSH}

    async def add(hub: "HubServices") -> "Device":
        account = await _active(hub, user)
        return await hub.credentials.add_device(account, name=name, authorized_key=public_key, scopes=wanted, actor=_CONSOLE)

    device = _with_hub(environment, add)
    can = format_scope_names(device.scopes)
    render.say(f'Connected "{render.plain(device.name)}" ({device.key.fingerprint}) to {render.plain(user)}: {can}.')


@command("list", variables=_HOME)
@click.argument("user")
@json_option
@pass_environment
def device_list(environment: Environment, user: str, as_json: bool) -> None:
    """List the devices of USER."""
    devices = _with_hub(environment, lambda hub: _devices_of(hub, user))
    if as_json:
        sys.stdout.write(render.as_json(devices))
        return
    sys.stdout.write(devices_table(devices, datetime.now(UTC), width=render.terminal_width()))


@command("scope", variables=_HOME, epilog=SCOPES_EPILOG)
@click.argument("user")
@click.argument("device")
@click.argument("scopes", nargs=-1, required=True, metavar="SCOPE...", shell_complete=shown_scopes)
@pass_environment
def device_scope(environment: Environment, user: str, device: str, scopes: tuple[str, ...]) -> None:
    """Say all that a DEVICE (its id, name or fingerprint) of USER may do, from its next request on.

    SCOPE is a scope, once or more, or the word none.
    """
    wanted = parse_scopes(() if scopes == ("none",) else scopes)

    async def change(hub: "HubServices") -> "Device":
        found = pick(await _devices_of(hub, user), device, what="device", listing=f"corral hub device list {user}")
        account = await hub.accounts.named(user)
        return await hub.credentials.set_device_scopes(account, found["id"], wanted, actor=_CONSOLE)

    changed = _with_hub(environment, change)
    render.say(scopes_sentence(changed.name, sorted(changed.scopes)))


@command("revoke", variables=_HOME)
@click.argument("user")
@click.argument("device")
@pass_environment
def device_revoke(environment: Environment, user: str, device: str) -> None:
    """Disconnect a DEVICE (its id, name or fingerprint) of USER: its next request is refused."""

    async def revoke(hub: "HubServices") -> str:
        found = pick(await _devices_of(hub, user), device, what="device", listing=f"corral hub device list {user}")
        await hub.credentials.revoke_device(await hub.accounts.named(user), found["id"], _CONSOLE)
        return str(found["name"])

    render.say(f'Disconnected "{_with_hub(environment, revoke)}".')


async def _devices_of(hub: "HubServices", user: str) -> list[dict[str, Any]]:
    return [device_object(device) for device in await hub.credentials.devices_of(await hub.accounts.named(user))]


# ── Hosted models ────────────────────────────────────────────────────────────────────────────────────────────────────


@command(variables=_HOME)
@click.argument("name")
@click.option("--upstream", default="", metavar="URL", help="An OpenAI-compatible server that runs it.")
@click.option("--upstream-model", default="", metavar="NAME", help="What the upstream calls it. [default: NAME]")
@click.option("--upstream-key-stdin", is_flag=True, help="Read the API key that the upstream wants from standard input.")
@click.option(
    "--private", is_flag=True, help="Only for the owner of its namespace, as a model of a private repository always is."
)
@pass_environment
def host(
    environment: Environment, name: str, upstream: str, upstream_model: str, upstream_key_stdin: bool, private: bool
) -> None:
    """Offer a model to signed-in devices and API keys: one of this hub's repositories, or one that an upstream server runs."""
    from corral.main.services import offer_repository, offer_upstream

    if (upstream_model or upstream_key_stdin) and not upstream:
        what = "--upstream-model" if upstream_model else "--upstream-key-stdin"
        raise Failed(f"{what} says something of an upstream, so it needs --upstream", status=2)
    is_public = not private
    if upstream:
        from corral.settings import parse_upstream_url

        address = parse_upstream_url(upstream, where="--upstream")
        key = _upstream_key() if upstream_key_stdin else None
        hosted = _with_hub(
            environment,
            lambda hub: offer_upstream(hub, name, url=address, model=upstream_model or name, is_public=not private, key=key),
        )
    else:
        found = _with_hub(
            environment,
            lambda hub: offer_repository(hub, name, is_public=not private),
            unknown="push it first (corral push), or say which server runs it (--upstream URL)",
        )
        hosted, is_public = found.name, found.is_public
    from corral.wire.names import DEFAULT_TAG, cloud_tag

    shown = hosted.removesuffix(f":{DEFAULT_TAG}")
    who = "everybody who is signed in or has an API key" if is_public else "the owner of its namespace alone"
    render.say(f"{render.plain(shown)} is offered to {who}, to devices as {render.plain(cloud_tag(shown))}.")


def _upstream_key() -> Secret:
    from corral.wire.pasted import wrapping_of

    text = pasted_secret("--upstream-key-stdin")
    # What such a key looks like is the upstream's own; what is around it would be sent along, and refused there without a reason.
    wrapping = wrapping_of(text)
    if wrapping or not is_sendable(text):
        fault = f"has {wrapping}" if wrapping else "holds characters that no API key has"
        raise Failed(f"what came on standard input {fault}", "pipe in the key alone, on one line and without quotes", status=2)
    return Secret(text)


@command(variables=_HOME)
@click.argument("name")
@pass_environment
def unhost(environment: Environment, name: str) -> None:
    """Stop offering a model. What is in the hub's repository stays."""
    from corral.main.services import withdraw_model

    if not _with_hub(environment, lambda hub: withdraw_model(hub, name)):
        raise Failed(f'"{name}" is not offered', f"{environment.settings.public_url}/library shows what is")
    render.say(f"{render.plain(name)} is no longer offered.")


@command(variables=_HOME)
@click.argument("name")
@click.argument("size", required=False)
@pass_environment
def quota(environment: Environment, name: str, size: str | None) -> None:
    """Say how much an account, or a repository called NAMESPACE/MODEL, may hold: a SIZE such as 20GB, or none of its own.

    Without a SIZE, show how much that is and how much of it is used."""
    from corral.main.services import set_quota, storage_of
    from corral.settings import parse_size

    unknown = "" if "/" in name else _USERS
    if size is None:
        shown, use = _known(storage_of(environment.settings, name), unknown=unknown)
        limit = "none" if use.quota_bytes is None else render.size(use.quota_bytes)
        what = "repository" if "/" in shown else "account"
        sys.stdout.write(render.facts([(what, shown), ("quota", limit), ("used", render.size(use.stored_bytes))]))
        return
    quota_bytes = None if size == "none" else parse_size(size)
    if quota_bytes is None and size != "none":
        raise Failed(f"{size!r} is no size", "give a size such as 500MB, 20GB or 1.5TB, or none", status=2)
    if size.isdigit() and 0 < (quota_bytes or 0) < _LEAST_QUOTA_BYTES:
        raise Failed(f"{size} would be {size} bytes", f"give a unit: {size}GB, or {size}B for so few bytes", status=2)
    shown = _known(set_quota(environment.settings, name, quota_bytes), unknown=unknown)
    default = "as much as its account may" if "/" in shown else "as much as CORRAL_QUOTA allows"
    limit = default if quota_bytes is None else f"at most {render.size(quota_bytes)}"
    render.say(f"{render.plain(shown)} may hold {limit}.")
    # What counts now, which may be the hub's default.
    _, use = wait_for(storage_of(environment.settings, name))
    if use.quota_bytes is not None and use.stored_bytes > use.quota_bytes:
        render.say(f"It holds {render.size(use.stored_bytes)}: nothing of that is deleted, and only further pushes are refused.")


@command("gc", variables=_HOME)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@json_option
@pass_environment
def collect(environment: Environment, dry_run: bool, as_json: bool) -> None:
    """Remove blobs that no repository has any more, uploads that were given up, and what killed processes left behind. A running
    hub does so every hour by itself."""
    from corral.main.services import collect_garbage

    collected = wait_for(collect_garbage(environment.settings, is_dry_run=dry_run))
    if as_json:
        sys.stdout.write(render.as_json({**asdict(collected), "dry_run": dry_run}))
        return
    rows = [
        ("blobs", str(collected.blobs), render.size(collected.size_bytes)),
        ("links", str(collected.links), ""),
        ("repositories", str(collected.repositories), ""),
        ("uploads", str(collected.uploads), ""),
        ("files", str(collected.files), ""),
    ]
    sys.stdout.write(render.table(("COULD GO" if dry_run else "REMOVED", "COUNT", "SIZE"), rows))


@command("rotate-keys", variables=_HOME)
@pass_environment
def rotate(environment: Environment) -> None:
    """Give the hub new secrets of its own: the key of registry tokens, the secret of download links, the pepper of API keys.

    What was made with the former ones stays good: tokens for an hour, links for a day, API keys as long as they live. A hub that
    is running takes the new ones at its next start."""
    from corral.main.services import rotate_keys

    wait_for(rotate_keys(environment.settings))
    render.say("Rotated the key of registry tokens, the secret of download links and the pepper of API keys.")
    render.say("Tokens and links by the former ones expire within an hour and a day; API keys that exist go on working.")
    # Until then it neither knows the new pepper nor signs with the new key.
    render.say("A hub that is running takes the new ones at its next start: restart it before you create API keys here.")


@command(hidden=True, variables=_HOME)
@click.argument("models", nargs=-1, metavar="NAME=FILE…")
@click.option("--parameter", "parameters", multiple=True, metavar='"NAME VALUE"', help="A PARAMETER of each model that is new.")
@pass_environment
def install(environment: Environment, models: tuple[str, ...], parameters: tuple[str, ...]) -> None:
    """Install GGUF files on this machine, publish them on its hub and offer them there. `corral up --model` runs this."""
    from corral.main.local import install_model
    from corral.main.services import publish_model

    chosen = parse_parameter_options(parameters)
    for name, path in [parse_model_option(text) for text in models]:
        for verb, work in (("installing", install_model), ("publishing", publish_model)):
            with render.progress(f"{verb} {render.plain(name)}") as report:
                wait_for(work(environment.settings, name, _absolute(path), report, parameters=chosen))


def _absolute(path: Path) -> Path:
    return path if path.is_absolute() else Path.cwd() / path


# ── The API's objects ────────────────────────────────────────────────────────────────────────────────────────────────


def parse_scopes(words: tuple[str, ...]) -> "frozenset[Scope]":
    """Scopes by name. Raises: Failed."""
    from corral.core.records import Scope

    return frozenset(Scope(name) for name in scope_names(words))


def account_object(account: "Account") -> dict[str, Any]:
    """An account as JSON."""
    fields = ("id", "name", "email", "is_admin", "created_at", "disabled_at", "quota_bytes")
    return {field: _json(getattr(account, field)) for field in fields}


def key_object(key: "ApiKey") -> dict[str, Any]:
    """An API key as GET /api/keys has it."""
    return {field: _json(getattr(key, field)) for field in _KEY_FIELDS}


def device_object(device: "Device") -> dict[str, Any]:
    """A device as GET /api/user/keys has it."""
    fields = ("scopes", "created_at", "last_used_at", "last_network")
    return {
        "id": device.id,
        "name": device.name,
        "fingerprint": device.key.fingerprint,
        "key": device.key.authorized_key,
        **{field: _json(getattr(device, field)) for field in fields},
        "current": False,
    }


def _json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return sorted(value) if isinstance(value, frozenset) else value


def _time(text: str | None) -> datetime | None:
    return render.parse_time(text or "")


def _state(account: dict[str, Any]) -> str:
    words = ["admin"] * account["is_admin"] + ["disabled"] * bool(account["disabled_at"])
    return ", ".join(words) or "active"
