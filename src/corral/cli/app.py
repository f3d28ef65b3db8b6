"""The `corral` command: its list of commands, how they are found, and what becomes of their errors.

Only click is imported here, and each command's module when it is called: what a command does not need, it does not pay for.
Help lines therefore stand in the table below.

Exit status: 0 done, 1 the operation failed, 2 wrong usage or settings, 130 stopped by Ctrl-C.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from corral.cli.context import Environment, Failed

#: command -> (module of this room, attribute, line of the list: at most 28 characters at the root, whose list has two columns).
#: An empty line keeps a command out of the list.
_ROOT = {
    "run": ("commands_run", "run", "Run a model"),
    "list": ("commands_models", "list_models", "List installed models"),
    "ps": ("commands_models", "ps", "List running models"),
    "show": ("commands_models", "show", "Show a model's details"),
    "stop": ("commands_models", "stop", "Unload a running model"),
    "pull": ("commands_transfer", "pull", "Bring a model here"),
    "push": ("commands_transfer", "push", "Send a model to a registry"),
    "create": ("commands_create", "create", "Make a model"),
    "cp": ("commands_create", "cp", "Copy a model"),
    "rm": ("commands_create", "rm", "Remove models"),
    "up": ("commands_serve", "up", "Run hub and local server"),
    "serve": ("commands_serve", "serve", "Run the local server"),
    "hub": ("app", "hub", "Run and manage a hub"),
    "authorize": ("app", "authorize", "Say who may use the server"),
    "signin": ("commands_account", "signin", "Connect this device to a hub"),
    "signout": ("commands_account", "signout", "Disconnect this device"),
    "whoami": ("commands_account", "whoami", "Show who you are there"),
    "keys": ("app", "keys", "Manage your API keys"),
    "devices": ("app", "devices", "Manage your devices"),
    "doctor": ("commands_doctor", "doctor", "Say what does not work"),
    "completion": ("completion", "completion", "Print a shell's completion"),
    "install": ("commands_hub", "install", ""),
    "__complete": ("completion", "complete", ""),
}
#: Other words for the same, as in ollama; understood and not listed.
_ALIASES = {"login": "signin", "logout": "signout", "ls": "list", "start": "serve"}
_HUB = {
    "serve": ("commands_serve", "hub_serve", "Run the hub"),
    "user": ("app", "hub_user", "Manage accounts"),
    "key": ("app", "hub_key", "Manage an account's API keys"),
    "device": ("app", "hub_device", "Manage an account's devices"),
    "host": ("commands_hub", "host", "Offer a model to signed-in devices and API keys"),
    "unhost": ("commands_hub", "unhost", "Stop offering a model"),
    "quota": ("commands_hub", "quota", "Say how much an account or a repository may hold"),
    "gc": ("commands_hub", "collect", "Remove content that nobody needs any more"),
    "scrub": ("commands_scrub", "scrub", "Read all content again and name what is damaged"),
    "backup": ("commands_backup", "backup", "Write all that the hub is into one archive"),
    "restore": ("commands_backup", "restore", "Make a hub of a backup"),
    "rotate-keys": ("commands_hub", "rotate", "Give the hub new secrets of its own"),
}
_HUB_USER = {
    "add": ("commands_hub", "user_add", "Create an account"),
    "list": ("commands_hub", "user_list", "List accounts"),
    "disable": ("commands_hub", "user_disable", "Lock an account out, with all its devices and keys"),
    "enable": ("commands_hub", "user_enable", "Let a disabled account in again"),
    "passwd": ("commands_hub", "user_passwd", "Set an account's password"),
    "promote": ("commands_hub", "user_promote", "Make an account an administrator"),
    "delete": ("commands_hub", "user_delete", "Delete an account with all that is its own"),
}
_HUB_KEY = {
    "create": ("commands_hub", "key_create", "Create an API key for an account"),
    "list": ("commands_hub", "key_list", "List an account's API keys"),
    "revoke": ("commands_hub", "key_revoke", "Revoke an API key"),
}
_HUB_DEVICE = {
    "add": ("commands_hub", "device_add", "Connect a device by its public key"),
    "list": ("commands_hub", "device_list", "List an account's devices"),
    "scope": ("commands_hub", "device_scope", "Change what a device may do"),
    "revoke": ("commands_hub", "device_revoke", "Disconnect a device"),
}
_KEYS = {
    "list": ("commands_keys", "keys_list", "List your API keys"),
    "create": ("commands_keys", "keys_create", "Create an API key; prints its secret once"),
    "rotate": ("commands_keys", "keys_rotate", "Replace an API key by a new one"),
    "revoke": ("commands_keys", "keys_revoke", "Revoke an API key"),
}
_AUTHORIZE = {
    "add": ("commands_authorize", "add", "Let a device in by its public key"),
    "key": ("commands_authorize", "key", "Make an API key; prints it once"),
    "list": ("commands_authorize", "list_keys", "List who may use the server"),
    "remove": ("commands_authorize", "remove", "Refuse a key from now on"),
}
_DEVICES = {
    "list": ("commands_keys", "devices_list", "List your devices"),
    "scope": ("commands_keys", "devices_scope", "Change what a device may do"),
    "revoke": ("commands_keys", "devices_revoke", "Disconnect a device"),
}

#: What helps against an error that a server answered with, by its code or status.
_ADVICE = {
    "unauthorized": "corral signin",
    "clock_skew": "set this machine's clock: sudo timedatectl set-ntp true",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def __init__(self, name: str, table: Mapping[str, tuple[str, str, str]], **options: Any) -> None:
        super().__init__(name, **options)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The listed names, in the table's order."""
        return [name for name, (_, _, line) in self._table.items() if line]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None when there is no such name."""
        entry = self._table.get(_ALIASES.get(cmd_name, cmd_name) if self.name == "corral" else cmd_name)
        if entry is None:
            return None
        module, attribute, _ = entry
        command = getattr(importlib.import_module(f"corral.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, and `corral help [COMMAND]` for `corral [COMMAND] --help`."""
        if self.name == "corral" and args[0] == "help":
            if not args[1:]:
                click.echo(ctx.get_help())
                ctx.exit()
            args = [*args[1:], "--help"]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone; a long one in two columns, so that it fits a screen of 24 lines."""
        rows = [(name, line) for name, (_, _, line) in self._table.items() if line]
        with formatter.section("Commands"):
            if len(rows) <= _LONG_LIST:
                formatter.write_dl(rows)
                return
            width = max(len(name) for name, _ in rows)
            cells = [f"{name:<{width}} {line}" for name, line in rows]
            half = (len(cells) + 1) // 2
            for left, right in zip(cells[:half], [*cells[half:], ""], strict=False):
                formatter.write(f"  {left:<{_COLUMN}}{right}".rstrip() + "\n")


def _show_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        from corral.cli.version import version_text

        click.echo(version_text(ctx.ensure_object(Environment).environ), nl=False)
        ctx.exit()


_HELP = {"help_option_names": ["-h", "--help"]}
#: A list of more commands than this has two columns, the first of so many characters.
_LONG_LIST, _COLUMN = 14, 38
_VERSION = "Show the server's version, and this command's if it differs."

root = LazyGroup("corral", _ROOT, help="Your own ollama.com: a local server, a command line and a hub.", context_settings=_HELP)
hub = LazyGroup("hub", _HUB, help="Run and manage a hub. These commands work on the hub's data in CORRAL_HOME.")
hub_user = LazyGroup("user", _HUB_USER, help="Manage the hub's accounts.")
hub_key = LazyGroup("key", _HUB_KEY, help="Manage an account's API keys.")
hub_device = LazyGroup("device", _HUB_DEVICE, help="Manage an account's devices.")
keys = LazyGroup("keys", _KEYS, help="Manage the API keys of your account on the hub.")
authorize = LazyGroup("authorize", _AUTHORIZE, help="Say who may use this machine's local server when others can reach it.")
devices = LazyGroup("devices", _DEVICES, help="Manage the devices connected to your account on the hub.")
click.option("-v", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help=_VERSION)(root)


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out one command line. Returns the exit status; every error has been shown."""
    try:
        status = root.main(list(arguments), prog_name="corral", standalone_mode=False, obj=Environment(environ))
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # The reader of our output (head, a pager) has left, which click tells by SystemExit and which is no failure of ours. The
        # interpreter would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "")
        return 0
    except click.ClickException as error:
        return _show_usage(error)
    except Exception as error:  # noqa: BLE001 - the outermost loop of a command: shown as an error, or as a fault of ours
        return _show(_sole(error), environ)
    return status if isinstance(status, int) else 0


def _show_usage(error: click.ClickException) -> int:
    from corral.cli.render import error_text
    from corral.cli.usage import usage_text

    print(error_text(*usage_text(error)), file=sys.stderr)
    return error.exit_code if error.exit_code > 1 else 2


def _sole(error: Exception) -> Exception:
    """What task groups have wrapped, where it is one failure alone: a server's port that was taken while it started, for one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _show(error: Exception, environ: Mapping[str, str]) -> int:
    from corral.cli.render import error_text
    from corral.wire.errors import CorralError

    if isinstance(error, Failed):
        print(error_text(error.message, error.advice), file=sys.stderr)
        return error.status
    if isinstance(error, CorralError):
        message, _, advice = error.message.partition(" → ")
        print(error_text(message, advice or _ADVICE.get(error.code, "")), file=sys.stderr)
        return 2 if type(error).__name__ == "BadSetting" else 1
    if isinstance(error, OSError) and error.strerror:
        print(error_text(f"{error.strerror}{f': {error.filename}' if error.filename else ''}"), file=sys.stderr)
        return 1
    if environ.get("OLLAMA_DEBUG", "0") not in ("", "0"):
        raise error
    advice = "run it again with OLLAMA_DEBUG=1 and report what that prints"
    print(error_text(f"this is a fault of corral: {type(error).__name__}", advice), file=sys.stderr)
    return 1
