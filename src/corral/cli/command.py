"""What every command of ours does as Ollama's: counts its arguments, takes `--flag=false`, and lists its variables in its help.

Source: the texts of cobra 1.7 and pflag, seen at ollama cmd/cmd.go, fb30760. The exit status of wrong usage is 2 where theirs
is 1 (docs/divergences.md).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from corral.cli.context import Environment, Failed

#: Completing must not hang on a server that does not answer.
_COMPLETION_TIMEOUT_S = 1.0
#: Every letter that a model's name may have, and none that means something to a shell.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:/@-]*")
#: What Go's strconv.ParseBool takes.
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


class Command(click.Command):
    """A command. variables: names of the environment variables that its help lists, in that order."""

    def __init__(self, *arguments: Any, variables: Sequence[str] = ("OLLAMA_HOST",), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.variables = tuple(variables)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with cobra's sentences for too few or too many arguments."""
        # Too many are counted below; click would name them instead.
        ctx.allow_extra_args = True
        try:
            extra = super().parse_args(ctx, self._plain(ctx, args))
        except click.MissingParameter as error:
            if not isinstance(error.param, click.Argument):
                raise
            raise click.UsageError(self._count_text(self._received(ctx)), ctx) from error
        except click.BadOptionUsage as error:
            error.ctx = ctx  # which click's parser leaves out, and with it whose help would help
            raise
        if extra and not ctx.resilient_parsing:
            raise click.UsageError(self._count_text(self._received(ctx) + len(extra)), ctx)
        return extra

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The variables, below the options."""
        super().format_epilog(ctx, formatter)
        if self.variables:
            from corral.cli.variables import MEANINGS

            with formatter.section("Environment Variables"):
                formatter.write_dl([(name, MEANINGS[name]) for name in self.variables])

    def _arguments(self) -> list[click.Argument]:
        return [param for param in self.params if isinstance(param, click.Argument)]

    def _received(self, ctx: click.Context) -> int:
        values = [ctx.params.get(argument.name or "") for argument in self._arguments()]
        return sum(len(value) if isinstance(value, tuple) else isinstance(value, str) for value in values)

    def _count_text(self, received: int) -> str:
        arguments = self._arguments()
        least = sum(max(argument.nargs, 1) for argument in arguments if argument.required)
        most = sum(argument.nargs for argument in arguments)
        if any(argument.nargs < 0 for argument in arguments):
            return f"requires at least {least} arg(s), only received {received}"
        if least == most:
            return f"accepts {most} arg(s), received {received}"
        between = f"between {least} and {most}" if least else f"at most {most}"
        return f"accepts {between} arg(s), received {received}"

    def _plain(self, ctx: click.Context, args: Sequence[str]) -> list[str]:
        """The words as click reads them, of the forms that Go's flags have besides: `--flag=true`, `--flag=false`, `-f=value`."""
        options = {spelling: option for option in self.params if isinstance(option, click.Option) for spelling in option.opts}
        end = args.index("--") if "--" in args else len(args)
        words: list[str] = []
        for word in args[:end]:
            name, equals, value = word.partition("=")
            option = options.get(name) if equals else None
            if option is not None and option.is_flag:
                words += _flag(ctx, option, name, value)
            elif option is not None and not name.startswith("--"):
                words += [name, value]
            else:
                words.append(word)
        return [*words, *args[end:]]


#: The variables of every command that asks a hub.
HUB_VARIABLES = ("CORRAL_HUB", "OLLAMA_API_KEY", "OLLAMA_HOST")


def _flag(ctx: click.Context, option: click.Option, name: str, value: str) -> list[str]:
    if value in _TRUE:
        return [name]
    if value in _FALSE:
        return option.secondary_opts[:1]
    text = f'invalid argument "{value}" for "{name}" flag: strconv.ParseBool: parsing "{value}": invalid syntax'
    raise click.UsageError(text, ctx)


def installed_models(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """What a shell completes where a model is named that is here."""
    return _completed(ctx, incomplete, "/api/tags")


def running_models(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """What a shell completes where a model is named that runs."""
    return _completed(ctx, incomplete, "/api/ps")


def _completed(ctx: click.Context, incomplete: str, path: str) -> list[str]:
    names = _names_at_server(ctx.ensure_object(Environment), path)
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def _names_at_server(environment: Environment, path: str) -> list[str]:
    """The names of the models that `path` (`/api/tags`, `/api/ps`) lists; none where no server answers quickly."""
    from corral.cli.api import LocalApi
    from corral.wire.errors import CorralError

    try:
        answer: Mapping[str, Any] = LocalApi(environment.settings, timeout_s=_COMPLETION_TIMEOUT_S).get(path)
        names = [str(model["name"]) for model in answer.get("models") or []]
        # Bash writes what it completes into the line as it is, where `$(…)` would be run.
        return [name for name in names if _PLAIN_NAME.fullmatch(name)]
    except (Failed, CorralError, AttributeError, KeyError, TypeError):
        return []


def command(name: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command, as click.command does."""
    return click.command(name, cls=Command, **options)
