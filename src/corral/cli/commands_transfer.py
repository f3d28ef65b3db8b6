"""pull and push: models between this machine and registries, by way of the local server. Source: ollama cmd/cmd.go, fb30760."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import click

from corral.cli.api import ApiError, LocalApi
from corral.cli.context import Environment, Failed, pass_environment
from corral.cli.progress import TransferView, follow
from corral.wire.errors import CorralError

_NOT_YOURS = "you are not authorized to push to this namespace, create the model under a namespace you own"
#: `403: {"errors":[{"code":…,"message":…}]}`: a registry's refusal as the server passes it on.
_REFUSAL = re.compile(r"(?:pull model manifest: )?(?P<status>[0-9]{3}): (?P<body>\{.*\})", re.DOTALL)
_insecure = click.option("--insecure", is_flag=True, help="Use plain http for the registry.")


@click.command()
@click.argument("model")
@_insecure
@pass_environment
def pull(environment: Environment, model: str, insecure: bool) -> None:
    """Bring a model here from its registry.

    A name without a host means the hub in use. What was begun before goes on where it was.
    """
    pull_model(LocalApi(environment.settings), model, insecure=insecure)


def pull_model(api: LocalApi, model: str, *, insecure: bool) -> None:
    """Pull, with its progress on standard error. Raises: Failed."""
    view = TransferView("pulling", monotonic=time.monotonic)
    body = {"model": model, "name": model, "insecure": insecure}
    try:
        with contextlib.closing(api.stream("/api/pull", body)) as events:
            is_done = follow(events, view)
    except ApiError as error:
        raise _pull_failed(error, model) from error
    if not is_done:
        raise Failed("the server stopped before the model was here", "run it again; what has arrived is kept")


def _pull_failed(error: ApiError, model: str) -> Failed:
    if error.message.endswith("file does not exist"):
        return Failed(
            f"{error.message}: {model}", "check the name; a private model is found only when you are signed in: corral signin"
        )
    return _readable(error)


@click.command()
@click.argument("model")
@_insecure
@click.option("--private", "visibility", flag_value="private", help="Let only its people see the model from now on.")
@click.option("--public", "visibility", flag_value="public", help="Let everybody pull the model from now on.")
@pass_environment
def push(environment: Environment, model: str, insecure: bool, visibility: str | None) -> None:
    """Send a model to its registry.

    A name without a host means the hub in use; there a new model is private unless --public is given.
    """
    api = LocalApi(environment.settings)
    body: dict[str, Any] = {"model": model, "name": model, "insecure": insecure}
    if visibility:
        body["visibility"] = visibility
    try:
        with contextlib.closing(api.stream("/api/push", body)) as events:
            is_done = follow(events, TransferView("pushing", monotonic=time.monotonic))
    except ApiError as error:
        raise _push_failed(error) from error
    if not is_done:
        raise Failed("the server stopped before the model was sent", "run it again; what was sent is kept")
    _tell_where(api, model)


def _push_failed(error: ApiError) -> Failed:
    words = error.message.lower()
    if "access denied" in words or "unauthorized" in words:
        return Failed(_NOT_YOURS, "corral whoami says who you are here, corral signin changes it")
    if error.message.startswith("model '"):
        return Failed(error.message, "corral list shows what is installed; corral cp gives a model another name")
    return _readable(error)


def _readable(error: ApiError) -> Failed:
    """The registry's own sentence out of a refusal; any other error as it is."""
    found = _REFUSAL.fullmatch(error.message)
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
    """The page of what was pushed, where there is one: on the hub in use."""
    from corral.wire.names import DEFAULT_HOST, DEFAULT_TAG, parse_name

    try:
        name = parse_name(model)
    except CorralError:
        return
    shown = str(name)
    hub = _hub(api)
    if hub and name.host.lower() in (DEFAULT_HOST, urlsplit(hub).netloc.lower()):
        shown = f"{hub.rstrip('/')}/{name.repository}" + ("" if name.tag == DEFAULT_TAG else f":{name.tag}")
    sys.stdout.write(f"\nYou can find your model at:\n\n\t{shown}\n")


def _hub(api: LocalApi) -> str:
    """The hub that the server uses; nothing where it is Ollama's, which does not tell."""
    try:
        status: Mapping[str, Any] = api.get("/api/status")
    except Failed:
        return ""
    hub = status.get("hub") if isinstance(status, Mapping) else None
    return hub if isinstance(hub, str) else ""
