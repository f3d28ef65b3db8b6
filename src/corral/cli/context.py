"""What every command shares: the environment it was called in, its common options, and how it says that it failed."""

import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from corral.settings import Settings

#: No key is longer.
_MOST_PASTED = 65536
T = TypeVar("T")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Failed(Exception):
    """A command that did not do what was asked. advice: the one thing to do about it, shown behind an arrow."""

    def __init__(self, message: str, advice: str = "", *, status: int = 1) -> None:
        self.message = message
        self.advice = advice
        self.status = status
        super().__init__(message)


class Environment:
    """What commands get from outside: the environment, read into settings when one asks."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self._settings: Settings | None = None

    @property
    def settings(self) -> "Settings":
        """Raises: BadSetting."""
        if self._settings is None:
            # Imported here: `--version` and `--help` need no settings.
            from corral.settings import Settings

            self._settings = Settings.from_env(self.environ)
        return self._settings


pass_environment = click.make_pass_decorator(Environment)


def json_option(command: Decorated) -> Decorated:
    """`--json`: print the API's objects instead of a table."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def hub_option(command: Decorated) -> Decorated:
    """`--hub URL`."""
    text = "The hub to use. [default: CORRAL_HUB, else the local server's hub, else the one saved by signin, else https://ollama.com]"
    return click.option("--hub", "hub_url", metavar="URL", default="", help=text, callback=_named_hub)(command)


def _named_hub(ctx: click.Context, param: click.Parameter, value: str) -> str:
    # `--hub "$HUB"` with an unset variable must not mean some other hub.
    if not value and ctx.get_parameter_source("hub_url") is click.core.ParameterSource.COMMANDLINE:
        raise click.BadParameter("it is empty; give a hub's address", ctx, param)
    return value


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run asynchronous work to its end. Ctrl-C cancels it and comes out as KeyboardInterrupt."""
    import asyncio  # as heavy as click, and `corral list` does without it

    return asyncio.run(work)


def secret_from(stream_option: bool, *, prompt: str, option: str, confirm: bool = False, rule: str = "") -> str:
    """A secret, from standard input when the option says so, else asked for on a terminal without echo. It never comes from the
    command line, where other users can read it. rule: told to whoever is asked. Raises: Failed without a terminal."""
    if stream_option:
        text = sys.stdin.readline().rstrip("\r\n")
        if not text:
            raise Failed("nothing came on standard input", f"pipe it in: … | corral … {option}", status=2)
        return text
    if not sys.stdin.isatty():
        raise Failed(f"there is no terminal to ask for the {prompt.lower()} on", f"pipe it in with {option}", status=2)
    if rule:
        click.echo(f"{rule[:1].upper()}{rule[1:]}.", err=True)
    text = click.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    return str(text)


def pasted_secret(option: str) -> str:
    """What somebody pasted, or piped in, as a key: without blanks at its ends, and with its further lines, since a key may have
    been broken in two. Raises: Failed when nothing came."""
    # Whoever pastes into a terminal does not end the input; behind a pipe it ends by itself.
    text = sys.stdin.readline() if sys.stdin.isatty() else sys.stdin.read(_MOST_PASTED)
    if not text.strip():
        raise Failed("nothing came on standard input", f"pipe it in: … | corral … {option}", status=2)
    return text.strip()
