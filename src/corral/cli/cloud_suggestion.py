"""Bringing a model here, with a second thought: where its name has nothing to pull, but the hub runs a model of that name.

Asked only for a name without tag and host. A name of another registry is nobody else's business, so the hub is not asked for it.
Source: ollama cmd/cloud_suggest.go, fb30760.
"""

import json
import sys
from collections.abc import Callable

import click

from corral.cli.api import ApiError, LocalApi
from corral.cli.context import Failed


def pull_or_suggest(api: LocalApi, model: str, pull: Callable[[str], None], *, insecure: bool, verb: str) -> str:
    """Pull a model, or the cloud's of that name when there is only that one and the person says yes. pull: does it;
    insecure: whether by plain http; verb: of the command that is advised, where there is nobody to ask. Returns the name of what
    was pulled. Raises: Failed."""
    try:
        pull(model)
    except Failed as error:
        suggested = _suggested(api, model, error, insecure=insecure)
        if not suggested:
            raise
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            advice = f"{json.dumps(suggested)} is available as a cloud model: corral {verb} {suggested}"
            raise Failed(error.message, advice) from error
        if not click.confirm(f"Did you mean {json.dumps(suggested)}?", default=True, err=True):
            raise
    else:
        return model
    pull(suggested)
    return suggested


def suggested_name(model: str) -> str:
    """The cloud's name to look for in place of a name, empty when there is none to look for."""
    from corral.wire.errors import CorralError
    from corral.wire.names import DEFAULT_HOST, Source, parse_name, parse_reference

    try:
        reference = parse_reference(model)
        name = parse_name(reference.base)
    except CorralError:
        return ""
    has_tag = ":" in reference.base.rpartition("/")[2]
    is_plain = reference.source is Source.UNSPECIFIED and not has_tag and name.host.lower() == DEFAULT_HOST
    return f"{reference.base}:cloud" if is_plain else ""


def _suggested(api: LocalApi, model: str, error: Failed, *, insecure: bool) -> str:
    """The name of a cloud model that exists, for a pull that failed because there was nothing of that name."""
    is_missing = isinstance(error.__cause__, ApiError) and error.__cause__.message.endswith("file does not exist")
    name = suggested_name(model) if is_missing and not insecure else ""
    if not name:
        return ""
    try:
        # The server passes this on to the hub, so it tells whether the hub would run it.
        api.post("/api/show", {"model": name})
    except Failed:
        return ""
    return name
