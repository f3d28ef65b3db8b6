"""The commands of a conversation: what a line asks for, and doing it.

A command takes a session and gives the next one, or None to leave. What it says are Ollama's own messages. Where Ollama would end
the whole conversation because the server could not be asked, an error is raised here, and the loop shows it and goes on.
Source: ollama cmd/interactive.go, fb30760.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from corral.cli import render, repl_help
from corral.cli.api import ApiError, LocalApi
from corral.cli.repl_state import ModelFacts, Session, is_cloud, parse_think, words_of
from corral.cli.waiting import Waiting
from corral.settings import DEFAULT_HUB
from corral.wire.errors import CorralError

FENCE = '"""'
_PARAMETERS = (
    *(
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "seed",
        "num_predict",
        "num_ctx",
        "num_keep",
        "num_batch",
        "num_gpu",
    ),
    *("main_gpu", "num_thread", "use_mmap", "repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty", "stop"),
)
_SET_WORDS = (
    *("parameter", "system", "format", "noformat", "think", "nothink", "verbose", "quiet"),
    *("wordwrap", "nowordwrap", "history", "nohistory"),
)
_SHOW_WORDS = ("info", "license", "modelfile", "parameters", "system", "template")
_COMMAND = re.compile(r"/(?:[A-Za-z]+|\?)")
_PADDED = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What commands work with. keep_history: switches whether questions are kept in the history file."""

    api: LocalApi
    keep_history: Callable[[bool], None]


Next = Session | None
Work = Callable[[Desk, Session, str], Next]


# ── What a text is ───────────────────────────────────────────────────────────────────────────────────────────────────


def is_open(text: str) -> bool:
    """Whether a text waits for the quotes that end it."""
    body = _fenced(text)
    return body is not None and not _is_closed(body)


def question_of(text: str) -> str:
    """A message as it is sent: without the quotes around it."""
    body = _fenced(text)
    return text if body is None or text.lstrip().startswith("/") else _without_end(body)


def command_of(text: str) -> str:
    """The command that a text is, known or not; empty for a message. A path (`/etc/hosts is what?`) is a message, and so are
    several lines, unless they set the system message."""
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    if not text.startswith("/") or not _COMMAND.fullmatch(word):
        return ""
    return word if "\n" not in text.strip() or text.split()[:2] == ["/set", "system"] else ""


def completions(text: str, models: Callable[[], Iterable[str]]) -> list[str]:
    """What the last word of a command may become. models: asked only where a model's name belongs."""
    *before, last = re.split(r"\s+", text)
    match before:
        case []:
            words: Iterable[str] = COMMANDS if text.startswith("/") else ()
        case ["/set"]:
            words = _SET_WORDS
        case ["/set", "parameter"]:
            words = _PARAMETERS
        case ["/set", "think"]:
            words = ("low", "medium", "high", "max")
        case ["/set", "format"]:
            words = ("json",)
        case ["/show"]:
            words = _SHOW_WORDS
        case ["/?"] | ["/help"]:
            words = ("set", "show", "shortcuts")
        case ["/load"] | ["/list"]:
            words = models()
        case _:
            words = ()
    return [word for word in words if word.startswith(last)]


def _fenced(text: str) -> str | None:
    """What follows the opening quotes of a message, or of `/set system`; None when there are none."""
    start = text.lstrip()
    found = re.match(r"/set\s+system\s+(?=\"\"\")", start)
    if found:
        start = start[found.end() :]
    return start.removeprefix(FENCE) if start.startswith(FENCE) else None


def _is_closed(body: str) -> bool:
    return body.rstrip().endswith(FENCE)


def _without_end(body: str) -> str:
    """What stands between the quotes; the line ends next to them are theirs."""
    inner = body.rstrip().removesuffix(FENCE) if _is_closed(body) else body
    return inner.removeprefix("\n").removesuffix("\n")


# ── Doing it ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def carry_out(desk: Desk, session: Session, text: str) -> Next:
    """Do what a command says. Raises: Failed, when the server could not be asked."""
    word = command_of(text)
    work = COMMANDS.get(word)
    if work is None:
        print(f"Unknown command '{word}'. Type /? for help")
        return session
    return work(desk, session, text.lstrip().removeprefix(word).strip())


def _leave(_desk: Desk, _session: Session, _rest: str) -> Next:
    return None


def _clear(_desk: Desk, session: Session, _rest: str) -> Next:
    print("Cleared session context")
    return session.cleared()


def _list(desk: Desk, session: Session, rest: str) -> Next:
    from corral.cli.commands_models import list_text

    sys.stdout.write(list_text(desk.api, rest))
    return session


def _help(_desk: Desk, session: Session, rest: str) -> Next:
    topics = {
        "set": repl_help.SET_HELP,
        "show": repl_help.SHOW_HELP,
        "shortcut": repl_help.SHORTCUTS,
        "shortcuts": repl_help.SHORTCUTS,
    }
    media = repl_help.MEDIA_HELP if session.facts.takes_media else ""
    print(topics.get(rest.removeprefix("/"), repl_help.HELP + media))
    return session


def _load(desk: Desk, session: Session, rest: str) -> Next:
    words = rest.split()
    if len(words) != 1:
        print("Usage:\n  /load <modelname>")
        return session
    print(f"Loading model '{words[0]}'")
    try:
        loaded = session.with_model(words[0], facts_of(desk.api, words[0]))
        load(desk.api, loaded)
    except ApiError as error:
        if error.code != 404:
            raise
        print(f"Couldn't find model '{words[0]}'")
        return session
    return loaded


def facts_of(api: LocalApi, model: str) -> ModelFacts:
    """What the server knows of a model. Raises: Failed."""
    return ModelFacts.of(api.post("/api/show", {"model": model}))


def load(api: LocalApi, session: Session) -> None:
    """Have the model ready before the first question: one that runs elsewhere is only asked whether this device may use it.
    Raises: Failed."""
    if not (session.facts.remote_host or is_cloud(session.model)):
        with Waiting():
            wanted = {**session.request(stream=False), "format": None, "options": None}
            api.post("/api/generate", {name: value for name, value in wanted.items() if value is not None})
        return
    hub = api.hub() or DEFAULT_HUB
    is_hubs = not session.facts.remote_host or session.facts.remote_host.startswith(hub)
    if is_hubs:
        api.post("/api/me")
    host = hub if is_hubs else session.facts.remote_host
    there = render.plain(session.facts.remote_model or session.model)
    print(f"Connecting to '{there}' on '{_host_in(host)}'", file=sys.stderr)


def _host_in(url: str) -> str:
    return render.plain(url.partition("://")[2] or url)


def _save(desk: Desk, session: Session, rest: str) -> Next:
    words = rest.split()
    if len(words) != 1:
        print("Usage:\n  /save <modelname>")
        return session
    try:
        with Waiting(), contextlib.closing(desk.api.stream("/api/create", session.recipe(words[0]))) as events:
            for _ in events:
                pass
    except ApiError as error:
        if "invalid model name" not in error.message:
            raise
        print(f"error: The model name '{words[0]}' is invalid")
        return session
    print(f"Created new model '{words[0]}'")
    return session


def _set(desk: Desk, session: Session, rest: str) -> Next:
    word, value = (*rest.split(maxsplit=1), "", "")[:2]
    match word:
        case "":
            print(repl_help.SET_HELP)
        case "history" | "nohistory":
            desk.keep_history(word == "history")
        case "wordwrap" | "nowordwrap":
            print(f"Set '{word}' mode.")
            return replace(session, is_wrapped=word == "wordwrap")
        case "verbose" | "quiet":
            print(f"Set '{word}' mode.")
            return replace(session, is_verbose=word == "verbose")
        case "think" | "nothink":
            return _set_think(session, word, value)
        case "format" | "noformat":
            return _set_format(session, word, value)
        case "parameter":
            return _set_parameter(session, words_of(value))
        case "system":
            return _set_system(session, value)
        case _:
            print(f"Unknown command '/set {word}'. Type /? for help")
    return session


def _set_think(session: Session, word: str, level: str) -> Session:
    chosen = False if word == "nothink" else parse_think(level or "true")
    if chosen is None:
        print(f'error: invalid think value: {json.dumps(level)} (must be "high", "medium", "low", "max", true, or false)')
        return session
    if "thinking" not in session.facts.capabilities:
        print(f'warning: model "{session.model}" does not support thinking output', file=sys.stderr)
    print(f"Set 'think' mode to '{level}'." if word == "think" and level else f"Set '{word}' mode.")
    return replace(session, think=chosen, is_think_chosen=True)


def _set_format(session: Session, word: str, value: str) -> Session:
    if word == "noformat":
        print("Disabled format.")
        return replace(session, format=None)
    if value != "json":
        print("Invalid or missing format. For 'json' mode use '/set format json'")
        return session
    print(f"Set format to '{value}' mode.")
    return replace(session, format=value)


def _set_parameter(session: Session, words: list[str]) -> Session:
    if len(words) < 2:
        print(repl_help.PARAMETER_HELP)
        return session
    name, *values = words
    try:
        changed = session.with_parameter(name, values)
    except CorralError as error:
        print(f"Couldn't set parameter: {json.dumps(error.message, ensure_ascii=False)}")
        return session
    print(f"Set parameter '{name}' to '{', '.join(values)}'")
    return changed


def _set_system(session: Session, text: str) -> Session:
    if not text:
        print(repl_help.SET_HELP)
        return session
    if text.startswith(FENCE):
        text = _without_end(text.removeprefix(FENCE))
    print("Set system message.")
    return session.with_system("" if text == '""' else text)


def _show(desk: Desk, session: Session, rest: str) -> Next:
    word = rest.split()[0] if rest else ""
    if not word:
        print(repl_help.SHOW_HELP)
    elif word not in _SHOW_WORDS:
        print(f"Unknown command '/show {word}'. Type /? for help")
    else:
        body = {"model": session.model, "name": session.model, "system": session.system, "options": dict(session.options)}
        sys.stdout.write(shown(desk.api.post("/api/show", body), word, session))
    return session


def shown(details: Mapping[str, Any], word: str, session: Session) -> str:
    """What /show prints. details: of /api/show; word: one of those that it takes."""
    if word == "info":
        from corral.cli.commands_models import show_text

        return show_text(details, verbose=False)
    if word == "parameters":
        return _parameters_text(str(details.get("parameters") or ""), session.options)
    text = session.system if word == "system" and session.system else str(details.get(word) or "")
    missing = {
        "license": "No license was specified for this model.",
        "system": "No system message was specified for this model.",
        "template": "No prompt template was specified for this model.",
    }
    if not text:
        return f"{missing.get(word, '')}\n"
    return f"{_lines(text)}\n\n" if word == "system" else f"{_lines(text)}\n"


def _parameters_text(own: str, chosen: Mapping[str, Any]) -> str:
    lines = own.splitlines() or ["No additional parameters were specified for this model."]
    text = "Model defined parameters:\n" + "".join(f"  {_lines(line)}\n" for line in lines) + "\n"
    if not chosen:
        return text
    rows = [f"  {name:<{_PADDED}} {_as_go(value)}\n" for name, value in chosen.items()]
    return text + "User defined parameters:\n" + "".join(rows) + "\n"


def _as_go(value: Any) -> str:
    """A value as Go prints it: `0.7`, `1`, `true`, `[a b]`."""
    if isinstance(value, list):
        return f"[{' '.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _lines(text: str) -> str:
    """Text of a model's maker, whose control characters are not for this terminal."""
    return "\n".join(render.plain(line.expandtabs()) for line in text.splitlines())


#: Command -> what does it, in the order in which Tab offers them.
COMMANDS: Mapping[str, Work] = {
    "/set": _set,
    "/show": _show,
    "/load": _load,
    "/save": _save,
    "/clear": _clear,
    "/list": _list,
    "/bye": _leave,
    "/exit": _leave,
    "/help": _help,
    "/?": _help,
}
