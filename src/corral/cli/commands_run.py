"""run: one answer for a prompt, or a conversation on a terminal. Behaviour as in ollama-surface 5.4, without its quirks in pipes.

One-shot goes to /api/generate, a conversation to /api/chat. Text goes to standard output as it arrives, figures and everything
else to standard error; a pipe sees the model's words and nothing more. Source: ollama cmd/cmd.go RunHandler, generate, fb30760.
"""

import contextlib
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from corral.cli import render
from corral.cli.answers import explained, figures, show_answer
from corral.cli.api import ApiError, LocalApi
from corral.cli.attachments import take_attachments
from corral.cli.command import Command, installed_models
from corral.cli.context import Environment, Failed, pass_environment
from corral.cli.repl_state import ModelFacts, Session, is_cloud
from corral.cli.repl_state import parse_think as think_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What there is to answer. words: of the command line; piped: what came on standard input, which stands before them."""

    words: tuple[str, ...]
    piped: str
    is_piped: bool

    @property
    def text(self) -> str:
        """The prompt."""
        return " ".join([self.piped, *self.words] if self.piped else self.words)

    @property
    def is_once(self) -> bool:
        """Whether one answer is wanted, and no conversation."""
        return bool(self.words) or self.is_piped or not sys.stdout.isatty()


class _Count(click.IntRange):
    name = "integer"  # click calls it an "integer range", which is no kind of number


class _RunCommand(Command):
    """Takes a bare `--think` as `--think=true`, and never the word behind it, which is the prompt's first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As every command, after that."""
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, ["--think=true" if word == "--think" else word for word in args[:end]] + args[end:])


@click.command(cls=_RunCommand, variables=("OLLAMA_HOST", "OLLAMA_EDITOR", "OLLAMA_NOHISTORY"))
@click.argument("model", shell_complete=installed_models)
@click.argument("prompt", nargs=-1)
@click.option("--verbose", is_flag=True, help="Print counts and speeds after the answer.")
@click.option("--format", "answer_format", default="", metavar="FORMAT", help="`json`, or a JSON schema.")
@click.option(
    "--think", flag_value="true", is_flag=False, default="", metavar="LEVEL", help="true, false, low, medium, high, max."
)
@click.option("--hidethinking", is_flag=True, help="Leave the model's thinking out.")
@click.option("--keepalive", default="", metavar="DURATION", help="How long the model stays loaded, such as 5m.")
@click.option("--dimensions", type=_Count(min=0), default=0, metavar="COUNT", help="Length of an embedding.")
@click.option("--truncate/--no-truncate", default=None, help="Cut a text that is too long for an embedding.")
@click.option("--nowordwrap", is_flag=True, help="Do not break lines between words.")
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

    Piped input comes before the prompt; in a conversation, /? lists commands.
    """
    wanted = Session(
        model=model,
        is_verbose=verbose,
        format=parse_format(answer_format),
        think=parse_think(think),
        is_think_chosen=bool(think),
        hides_thinking=hidethinking,
        keep_alive=parse_keep_alive(keepalive),
        is_wrapped=not nowordwrap,
    )
    api = LocalApi(environment.settings)
    try:
        _run(environment, api, wanted, _given(prompt), insecure=insecure, embedding=_embedding_options(dimensions, truncate))
    except ApiError as error:
        raise explained(error) from error


def _run(
    environment: Environment, api: LocalApi, wanted: Session, given: _Given, *, insecure: bool, embedding: Mapping[str, Any]
) -> None:
    name, facts = _show_or_pull(api, wanted.model, insecure=insecure)
    session = wanted.with_model(name, facts)
    _keep_stub(api, name)
    if "embedding" in facts.capabilities and "completion" not in facts.capabilities:
        _embed(api, session, given.text, embedding)
    elif "image" in facts.capabilities:
        raise Failed("image generation models are not currently supported")
    elif given.is_once:
        _answer_once(environment, api, session, given)
    else:
        # Imported here: what edits a line on a terminal takes longer to import than an answer to one prompt needs it.
        from corral.cli.talk import talk

        talk(environment, api, session)


def _show_or_pull(api: LocalApi, model: str, *, insecure: bool) -> tuple[str, ModelFacts]:
    """(name, what the server knows) of the model; one that is not here is pulled first, and one that is the hub's is not."""
    try:
        return model, ModelFacts.of(_show(api, model))
    except ApiError as error:
        if error.code != 404:
            raise
        if is_cloud(model):
            raise _not_offered(api, model) from error
    from corral.cli.cloud_suggestion import pull_or_suggest
    from corral.cli.commands_transfer import pull_model

    def pull(name: str) -> None:
        pull_model(api, name, insecure=insecure, verb="run")

    pulled = pull_or_suggest(api, model, pull, insecure=insecure, verb="run")
    return pulled, ModelFacts.of(_show(api, pulled))


def _show(api: LocalApi, model: str) -> Mapping[str, Any]:
    details: dict[str, Any] = api.post("/api/show", {"model": model})
    return details


def _keep_stub(api: LocalApi, model: str) -> None:
    """Have a cloud model among the installed ones, as its stub, so that it is listed from now on. Whether that works or not, the
    model can be run."""
    if not is_cloud(model):
        return
    from corral.wire.names import cloud_tag, parse_reference

    stub = cloud_tag(parse_reference(model).base)
    with contextlib.suppress(Failed):
        listed = {str(one["name"]).lower() for one in api.get("/api/tags").get("models") or []}
        if listed.isdisjoint((model.lower(), stub.lower())):
            api.post("/api/pull", {"model": stub, "name": stub, "stream": False})


def _not_offered(api: LocalApi, model: str) -> Failed:
    """What to say of a cloud model that the server's hub does not have. Only a Corral server tells which hub it uses."""
    hub = api.hub()
    if not hub:
        return Failed(f"the hub does not offer '{model}'", "look at the hub's library")
    return Failed(f"the hub {urlsplit(hub).netloc} does not offer '{model}'", f"open {hub}/library")


def _given(words: tuple[str, ...]) -> _Given:
    is_piped = not sys.stdin.isatty()
    return _Given(words=words, piped=_piped() if is_piped else "", is_piped=is_piped)


def _piped() -> str:
    """What came on standard input; what of it is no UTF-8 is replaced, as Go does when it writes JSON."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return sys.stdin.read()


def parse_think(text: str) -> bool | str | None:
    """The value of --think. Raises: Failed."""
    value = think_of(text)
    if text and value is None:
        raise Failed(f'invalid value for --think: "{text}" (must be true, false, high, medium, low, or max)', status=2)
    return value


def parse_keep_alive(text: str) -> str | float:
    """The value of --keepalive: a duration as it is, a bare number as seconds. Raises: Failed."""
    if not text:
        return ""
    from corral.settings import parse_seconds

    seconds = parse_seconds(text)
    if seconds is None:
        raise Failed(f'invalid value for --keepalive: "{text}" (a duration such as 5m or 1h30m, or seconds)', status=2)
    return text if text[-1].isalpha() else seconds


def parse_format(text: str) -> Any:
    """The value of --format: `json`, or the schema it spells. Raises: Failed."""
    if not text or text == "json":
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failed("--format takes json, or a JSON schema", status=2) from error


def _embedding_options(dimensions: int, truncate: bool | None) -> dict[str, Any]:
    options = {"dimensions": dimensions or None, "truncate": truncate}
    return {name: value for name, value in options.items() if value is not None}


def _embed(api: LocalApi, session: Session, text: str, options: Mapping[str, Any]) -> None:
    if not text:
        raise Failed(f'embedding models require input text. Usage: corral run {session.model} "your text here"', status=2)
    kept = {} if session.keep_alive == "" else {"keep_alive": session.keep_alive}
    vectors = api.post("/api/embed", {"model": session.model, "input": text, **kept, **options})["embeddings"]
    if not vectors:
        raise Failed("no embeddings returned")
    print(json.dumps(vectors[0], separators=(",", ":")))


def _answer_once(environment: Environment, api: LocalApi, session: Session, given: _Given) -> None:
    """One answer. An empty prompt only loads the model. Ctrl-C ends the answer and is no failure, as in ollama."""
    text, more = _with_files(environment.settings.home, given) if session.facts.takes_media else (given.text, {})
    events = api.stream("/api/generate", session.request(prompt=text, **more))
    with contextlib.closing(events):
        answer = show_answer(events, is_wrapped=session.is_wrapped, hides_thinking=session.hides_thinking)
    if answer.is_cut:
        print()
        return
    if text:
        print("\n")
    if session.is_verbose:
        sys.stderr.write(figures(answer.final))


def _with_files(home: Path, given: _Given) -> tuple[str, dict[str, Any]]:
    """The prompt without the files it names, and those files. They are looked for in what the person wrote: a page that is piped
    in for the model to read does not choose what is sent."""
    if given.words:
        words, attached = take_attachments(" ".join(given.words), home)
        text = f"{given.piped} {words}" if given.piped else words
    else:
        text, attached = take_attachments(given.piped, home)
    for one in attached:
        print(f"Added {one.kind} '{render.plain(one.path)}'", file=sys.stderr)
    return text, {"images": [one.data for one in attached]} if attached else {}
