"""pull and push: models between this machine and registries, by way of the local server. Source: ollama cmd/cmd.go, fb30760."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from corral.cli import render
from corral.cli.api import ApiError, LocalApi, ServerApi
from corral.cli.command import command, installed_models
from corral.cli.context import Environment, Failed, pass_environment
from corral.cli.other_tags import is_at, other_tags
from corral.cli.progress import TransferView, follow
from corral.settings import DEFAULT_HUB
from corral.wire.errors import CorralError

_NOT_YOURS = "you are not authorized to push to this namespace, create the model under a namespace you own"
#: `403: {"errors":[{"code":…,"message":…}]}`: a registry's refusal as the server passes it on.
_REFUSAL = re.compile(r"(?:pull model manifest: )?(?P<status>[0-9]{3}): (?P<body>\{.*\})", re.DOTALL)
#: So many other tags are named.
_MAX_TAGS = 5
_insecure = click.option("--insecure", is_flag=True, help="Use plain http for the registry.")


@command()
@click.argument("model", shell_complete=installed_models)
@_insecure
@pass_environment
def pull(environment: Environment, model: str, insecure: bool) -> None:
    """Bring a model here from its registry.

    A name without a host means the hub in use. What was begun before goes on where it was.
    """
    from corral.cli.cloud_suggestion import pull_or_suggest

    api = LocalApi(environment.settings)
    pull_or_suggest(api, model, lambda name: pull_model(api, name, insecure=insecure), insecure=insecure, verb="pull")


def pull_model(api: LocalApi, model: str, *, insecure: bool, verb: str = "pull") -> None:
    """Pull, with its progress on standard error. verb: of the command that is advised where another tag is there. Raises:
    Failed."""
    view = TransferView("pulling", monotonic=time.monotonic)
    body = {"model": model, "name": model, "insecure": insecure}
    try:
        with contextlib.closing(api.stream("/api/pull", body)) as events:
            is_done = follow(events, view)
    except ApiError as error:
        if _is_missing(error):
            # What was begun has come to nothing, and another name may be asked for next.
            view.forget()
        raise _pull_failed(api, error, model, verb) from error
    if not is_done:
        raise Failed("the server stopped before the model was here", "run it again; what has arrived is kept")


def _is_missing(error: ApiError) -> bool:
    return error.said.endswith("file does not exist")


def _pull_failed(api: LocalApi, error: ApiError, model: str, verb: str) -> Failed:
    if _is_missing(error):
        if others := other_tags(api, model):
            return _other_tag(model, others, verb)
        return Failed(f"{error.message}: {model}", _advice_on_missing(api, model))
    if error.advice and api.hub() == DEFAULT_HUB and is_at(model, DEFAULT_HUB):
        return Failed(error.message, f"{error.advice}; to use a hub of your own: corral signin --hub URL")
    return _readable(error)


def _other_tag(model: str, others: Sequence[str], verb: str) -> Failed:
    from corral.wire.names import parse_name

    name = parse_name(model)
    more = " and more" if len(others) > _MAX_TAGS else ""
    there = f"there {'is' if len(others) == 1 else 'are'} {', '.join(others[:_MAX_TAGS])}{more}"
    return Failed(f"{name.short.rpartition(':')[0]} has no tag {name.tag} here; {there}", f"corral {verb} {others[0]}")


def _advice_on_missing(api: LocalApi, model: str) -> str:
    """What to do about a model that a registry does not show. Who is signed in need not be told to."""
    hub = api.hub()
    if hub and not is_at(model, hub):
        return "check the name"
    check = f"check the name ({hub.rstrip('/')}/library)" if hub else "check the name"
    try:
        account = str(api.post("/api/me")["name"])
    except (Failed, KeyError, TypeError):
        return f"{check}; a private model is found only when you are signed in: corral signin"
    return f"{check}; if it is a private model, {account} has to be let in by its owner"


@command()
@click.argument("model", shell_complete=installed_models)
@_insecure
@click.option("--private", "is_private", is_flag=True, help="Let only its people see the model from now on.")
@click.option("--public", "is_public", is_flag=True, help="Let everybody pull the model from now on.")
@pass_environment
def push(environment: Environment, model: str, insecure: bool, is_private: bool, is_public: bool) -> None:
    """Send a model to its registry.

    A name without a host means the hub in use; there a new model is private unless --public is given.
    """
    if is_private and is_public:
        raise Failed("only one of '--private' or '--public' can be specified", "corral push --help", status=2)
    api = LocalApi(environment.settings)
    body: dict[str, Any] = {"model": model, "name": model, "insecure": insecure}
    if is_private or is_public:
        body["visibility"] = "private" if is_private else "public"
    view = TransferView("pushing", monotonic=time.monotonic)
    try:
        with contextlib.closing(api.stream("/api/push", body)) as events:
            is_done = follow(events, view)
    except ApiError as error:
        refusal = _push_failed(error)
        if refusal is not error:
            # Nothing was sent, so there is no progress to be seen beside the reason.
            view.forget()
        raise refusal from error
    if not is_done:
        raise Failed("the server stopped before the model was sent", "run it again; what was sent is kept")
    _tell_where(api, model)


def _push_failed(error: ApiError) -> Failed:
    words = error.said.lower()
    if "access denied" in words or "unauthorized" in words:
        return Failed(_NOT_YOURS, "corral whoami says who you are here, corral signin changes it")
    if error.said.startswith("model '"):
        return Failed(error.said, "corral list shows what is installed; corral cp gives a model another name")
    return _readable(error)


def _readable(error: ApiError) -> Failed:
    """The registry's own sentence out of a refusal; any other error as it is."""
    found = _REFUSAL.fullmatch(error.said)
    if found is None:
        return error
    message = _message_in(found["body"])
    if not message:
        return error
    advice = "corral signin" if found["status"] == "403" and "/connect" in message else ""
    return Failed(message, advice)


def _message_in(body: str) -> str:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    errors = document.get("errors") if isinstance(document, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else document
    message = (first.get("message") or first.get("error")) if isinstance(first, dict) else None
    return message if isinstance(message, str) else ""


def _tell_where(api: LocalApi, model: str) -> None:
    """The page of what was pushed, where there is one: on the hub in use; and who can pull it from there."""
    from corral.wire.names import DEFAULT_TAG, parse_name

    try:
        name = parse_name(model)
    except CorralError:
        return
    shown, hub = str(name), api.hub()
    is_at_hub = bool(hub) and is_at(model, hub)
    if is_at_hub:
        shown = f"{hub.rstrip('/')}/{name.repository}" + ("" if name.tag == DEFAULT_TAG else f":{name.tag}")
    sys.stdout.write(f"\nYou can find your model at:\n\n\t{shown}\n")
    sys.stdout.flush()
    if is_at_hub and (line := _visibility_line(ServerApi.of_stranger(hub, api.proxies), name.repository)):
        render.say(line)


def _visibility_line(hub: ServerApi, repository: str) -> str:
    """Who can pull it: what a stranger finds, asked as one; empty when the hub does not say."""
    try:
        is_public = hub.has(f"/{repository}")
    except Failed:
        return ""
    return "It is public: everybody can pull it." if is_public else "It is private: only people you let in can pull it."
