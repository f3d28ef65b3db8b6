"""run: one answer for a prompt, or a plain conversation. Behaviour as in ollama-surface 5.4, without its quirks in pipes.

One-shot goes to /api/generate, a conversation to /api/chat. Text goes to standard output as it arrives, figures and everything
else to standard error; a pipe sees the model's words and nothing more.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import click

from corral.cli.answers import RunOptions, figures, show_answer
from corral.cli.api import ApiError, LocalApi
from corral.cli.context import Environment, Failed, pass_environment

_THINK_WORDS: dict[str, bool | str] = {
    "true": True,
    "false": False,
    "high": "high",
    "medium": "medium",
    "low": "low",
    "max": "max",
}


class _RunCommand(click.Command):
    """Takes a bare `--think` as `--think=true`, and never the word behind it, which is the prompt's first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, ["--think=true" if word == "--think" else word for word in args[:end]] + args[end:])


@click.command(cls=_RunCommand)
@click.argument("model")
@click.argument("prompt", nargs=-1)
@click.option("--verbose", is_flag=True, help="Print counts and speeds after the answer.")
@click.option("--format", "answer_format", default="", metavar="FORMAT", help="`json`, or a JSON schema.")
@click.option(
    "--think", flag_value="true", is_flag=False, default="", metavar="LEVEL", help="true, false, low, medium, high, max."
)
@click.option("--hidethinking", is_flag=True, help="Leave the model's thinking out.")
@click.option("--keepalive", default="", metavar="DURATION", help="How long the model stays loaded, such as 5m.")
@click.option("--dimensions", type=click.IntRange(min=0), default=0, help="Length of an embedding.")
@click.option("--truncate/--no-truncate", default=None, help="Cut a text that is too long for an embedding.")
@click.option("--nowordwrap", is_flag=True, hidden=True, help="Accepted for ollama's sake; lines are never wrapped here.")
@click.option("--insecure", is_flag=True, help="Use plain http for the registry of a model that is not here yet.")
@pass_environment
def run(
    environment: Environment,
    model: str,
    prompt: tuple[str, ...],
    verbose: bool,
    answer_format: str,
    think: str,
    hidethinking: bool,
    keepalive: str,
    dimensions: int,
    truncate: bool | None,
    nowordwrap: bool,
    insecure: bool,
) -> None:
    """Run a model: answer PROMPT, or talk with it when there is none.

    What is piped in comes before the prompt.
    """
    options = RunOptions(
        model=model,
        verbose=verbose,
        format=parse_format(answer_format),
        think=parse_think(think),
        hide_thinking=hidethinking,
        keep_alive=keepalive,
        dimensions=dimensions,
        truncate=truncate,
    )
    api = LocalApi(environment.settings)
    has_prompt, text = _prompt_of(prompt)
    capabilities = _show_or_pull(api, model, insecure=insecure).get("capabilities") or []
    if "embedding" in capabilities and "completion" not in capabilities:
        _embed(api, options, text)
    elif has_prompt or not sys.stdout.isatty():
        _answer_once(api, options, text)
    else:
        from corral.cli.talk import talk

        talk(environment, api, options)


def _show_or_pull(api: LocalApi, model: str, *, insecure: bool) -> Mapping[str, Any]:
    """What the model can do; one that is not here is pulled first, and one that is the hub's is not."""
    try:
        return _show(api, model)
    except ApiError as error:
        if error.code != 404:
            raise
        if _is_cloud(model):
            raise _not_offered(api, model) from error
    from corral.cli.commands_transfer import pull_model

    pull_model(api, model, insecure=insecure)
    return _show(api, model)


def _show(api: LocalApi, model: str) -> Mapping[str, Any]:
    details: dict[str, Any] = api.post("/api/show", {"model": model})
    return details


def _is_cloud(model: str) -> bool:
    from corral.wire.names import Source, parse_reference

    return parse_reference(model).source is Source.CLOUD


def _not_offered(api: LocalApi, model: str) -> Failed:
    """What to say of a cloud model that the server's hub does not have. Only a Corral server tells which hub it uses."""
    status = api.get("/api/status")
    hub = status.get("hub") if isinstance(status, dict) else None
    if not isinstance(hub, str) or not hub:
        return Failed(f"the hub does not offer '{model}'", "look at the hub's library")
    return Failed(f"the hub {urlsplit(hub).netloc} does not offer '{model}'", f"open {hub}/library")


def _prompt_of(words: tuple[str, ...]) -> tuple[bool, str]:
    """(whether a prompt was given at all, its text): piped input first, then the words of the command line."""
    parts = list(words)
    is_piped = not sys.stdin.isatty()
    if is_piped and (piped := sys.stdin.read()):
        parts.insert(0, piped)
    return bool(words) or is_piped, " ".join(parts)


def parse_think(text: str) -> bool | str | None:
    """The value of --think. Raises: Failed."""
    if not text:
        return None
    if text not in _THINK_WORDS:
        raise Failed(f'invalid value for --think: "{text}" (must be true, false, high, medium, low, or max)', status=2)
    return _THINK_WORDS[text]


def parse_format(text: str) -> Any:
    """The value of --format: `json`, or the schema it spells. Raises: Failed."""
    if not text or text == "json":
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failed("--format takes json, or a JSON schema", status=2) from error


def _embed(api: LocalApi, options: RunOptions, text: str) -> None:
    if not text:
        raise Failed(f'embedding models require input text. Usage: corral run {options.model} "your text here"', status=2)
    body: dict[str, Any] = {"model": options.model, "input": text}
    if options.dimensions:
        body["dimensions"] = options.dimensions
    if options.truncate is not None:
        body["truncate"] = options.truncate
    print(json.dumps(api.post("/api/embed", body)["embeddings"][0]))


def _answer_once(api: LocalApi, options: RunOptions, text: str) -> None:
    """One answer. An empty prompt only loads the model. Ctrl-C ends the answer and is no failure, as in ollama."""
    try:
        with contextlib.closing(api.stream("/api/generate", {**options.body(), "prompt": text})) as events:
            final, _ = show_answer(events, options)
    except KeyboardInterrupt:
        print()
        return
    if text:
        print("\n")
    if options.verbose:
        sys.stderr.write(figures(final))
