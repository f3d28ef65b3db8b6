"""The conversation of `corral run MODEL` on a terminal: read, answer or carry out, until the person leaves.

Whatever fails is said, and the prompt comes back with the conversation as it was: a model that is gone, a server that is gone, a
hub that wants a sign-in or some patience. Source: ollama cmd/interactive.go generateInteractive, fb30760.
"""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from corral.cli import render, repl_commands
from corral.cli.answers import explained, figures, show_answer, show_failure, show_stored
from corral.cli.api import ApiError, LocalApi
from corral.cli.attachments import take_attachments
from corral.cli.context import Environment, Failed
from corral.cli.repl_commands import Desk, carry_out, command_of, question_of
from corral.cli.repl_history import HistoryFile
from corral.cli.repl_state import Session
from corral.cli.repl_terminal import Left, Terminal, quiet_keyboard


def talk(environment: Environment, api: LocalApi, session: Session) -> None:
    """Converse until the person leaves. Raises: Failed, when the model cannot be had at all."""
    settings = environment.settings
    history = HistoryFile(settings.home / ".ollama" / "history", is_kept=not settings.is_history_off)
    desk = Desk(api=api, keep_history=lambda is_kept: setattr(history, "is_kept", is_kept))
    try:
        with quiet_keyboard():
            repl_commands.load(api, session)
    except ApiError as error:
        raise explained(error) from error
    _replay(session)
    terminal = Terminal(
        history,
        editor=settings.editor or "vi",
        is_open=repl_commands.is_open,
        complete=lambda text: repl_commands.completions(text, lambda: _installed(api)),
    )
    after: Session | None = session
    while after is not None:
        session = after
        match terminal.read():
            case Left.ENDED:
                return
            case Left.INTERRUPTED:
                print("Use Ctrl + d or /bye to exit.")
            case Left.DROPPED:
                continue
            case str(text) if text.strip():
                after = _respond(environment, desk, session, text)


def _replay(session: Session) -> None:
    """Show what was said before this model was saved."""
    for message in session.facts.messages:
        content = str(message.get("content") or "")
        if message.get("role") == "user":
            # Whoever made the model wrote that, too.
            print(">>> " + render.plain_text(content).replace("\n", "\n... "))
        elif message.get("role") == "assistant":
            show_stored(content, is_wrapped=session.is_wrapped)


def _installed(api: LocalApi) -> Iterable[str]:
    try:
        return [str(model["name"]) for model in api.get("/api/tags").get("models") or []]
    except Failed:
        return []


def _respond(environment: Environment, desk: Desk, session: Session, text: str) -> Session | None:
    """The session after a text; as it was when that failed or was stopped before there was anything."""
    try:
        with quiet_keyboard():
            if command_of(text):
                return carry_out(desk, session, text)
            return _ask(environment, desk.api, session, question_of(text))
    except KeyboardInterrupt:
        print()
    except Failed as error:
        show_failure(_in_conversation(error, session))
    return session


def _ask(environment: Environment, api: LocalApi, session: Session, text: str) -> Session:
    """One question and its answer. Raises: Failed."""
    question = _question(environment, session, text)
    body = session.request(messages=[*session.messages, question])
    with contextlib.closing(api.stream("/api/chat", body)) as events:
        answer = show_answer(events, is_wrapped=session.is_wrapped, hides_thinking=session.hides_thinking)
    print("\n")
    if answer.is_cut and not answer.content:
        return session
    if session.is_verbose and not answer.is_cut:
        sys.stderr.write(figures(answer.final))
    return session.with_answer(question, answer.message)


def _question(environment: Environment, session: Session, text: str) -> dict[str, Any]:
    question: dict[str, Any] = {"role": "user", "content": text}
    if not session.facts.takes_media:
        return question
    content, attached = take_attachments(text, environment.settings.home)
    for one in attached:
        print(f"Added {one.kind} '{render.plain(one.path)}'", file=sys.stderr)
    return {**question, "content": content, "images": [one.data for one in attached]} if attached else question


def _in_conversation(error: Failed, session: Session) -> Failed:
    """An error with what can be done about it from here."""
    known = explained(error)
    if isinstance(known, ApiError) and known.code == 404 and not known.advice:
        return Failed(known.message, f"/list shows what is installed, /load goes on with another model than {session.model}")
    return known
