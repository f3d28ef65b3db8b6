"""What is said about a command line that cannot be understood: Ollama's own sentences, and below them the one thing to do.

Source: the texts of cobra 1.7 and pflag, seen at ollama cmd/cmd.go, fb30760.
"""

from typing import Final

import click

#: What other programs have a command for, and we an option.
_OPTIONS: Final = {"version": "corral --version"}


def usage_text(error: click.ClickException) -> tuple[str, str]:
    """(what was wrong, what to do)."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    help_of = f"{context.command_path if context else 'corral'} --help"
    match error:
        case click.NoSuchOption():
            return _unknown_option(error.option_name), _meant(error.possibilities) or help_of
        case click.exceptions.NoSuchCommand():
            path = context.command_path if context else "corral"
            meant = _OPTIONS.get(error.command_name, "") or _meant(_close(error), path)
            return f'unknown command "{error.command_name}" for "{path}"', meant or help_of
        case click.BadOptionUsage():
            return f"flag needs an argument: {_as_pflag(error.option_name)}", help_of
        case click.MissingParameter(param=click.Option() as option):
            return f'required flag(s) "{option.name}" not set', help_of
        case click.BadParameter(param=click.Option() as option):
            return f'invalid argument for "{max(option.opts, key=len)}" flag: {error.message}', help_of
    return error.format_message(), help_of


def _unknown_option(name: str) -> str:
    return f"unknown flag: {name}" if name.startswith("--") else f"unknown shorthand flag: {_as_pflag(name)}"


def _as_pflag(name: str) -> str:
    return name if name.startswith("--") else f"'{name[1:2]}' in {name}"


def _close(error: click.exceptions.NoSuchCommand) -> list[str]:
    from difflib import get_close_matches

    if error.ctx is None or not isinstance(error.ctx.command, click.Group):
        return []
    return get_close_matches(error.command_name, error.ctx.command.list_commands(error.ctx))


def _meant(possibilities: list[str] | None, path: str = "") -> str:
    if not possibilities:
        return ""
    return f"did you mean {' or '.join(f'{path} {word}'.strip() for word in possibilities[:2])}?"
