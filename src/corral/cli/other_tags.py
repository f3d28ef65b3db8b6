"""Which other tags a model has whose tag is not there: among the installed ones, and at the hub in use."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from corral.cli.api import LocalApi, ServerApi
from corral.cli.context import Failed
from corral.settings import DEFAULT_HUB
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.wire.names import ModelName


def other_tags(api: LocalApi, model: str) -> list[str]:
    """The full names of what has the name of model and another tag, those that are installed first. The hub is asked as a
    stranger asks, so a private repository is not among them; nor is what nobody answers in time."""
    from corral.wire.names import parse_name

    try:
        wanted = parse_name(model)
    except CorralError:
        return []
    prefix = wanted.short.rpartition(":")[0]
    names = [*_installed(api), *(f"{prefix}:{tag}" for tag in _at_hub(api, model, wanted))]
    found: dict[ModelName, str] = {}
    for text in names:
        try:
            name = parse_name(text)
        except CorralError:
            continue
        if name.key != wanted.key and replace(name.key, tag=wanted.key.tag) == wanted.key:
            found.setdefault(name.key, name.short)
    return list(found.values())


def is_at(model: str, hub: str) -> bool:
    """Whether a name means that hub: without a host, or with its own."""
    from corral.wire.names import DEFAULT_HOST, parse_name

    try:
        return parse_name(model).host.lower() in (DEFAULT_HOST, urlsplit(hub).netloc.lower())
    except CorralError:
        return False


def _installed(api: LocalApi) -> list[str]:
    try:
        return _texts(api.get("/api/tags"), "models", "name")
    except Failed:
        return []


def _at_hub(api: LocalApi, model: str, wanted: "ModelName") -> list[str]:
    hub = api.hub()
    # Ollama's registry has no list of tags.
    if not hub or hub == DEFAULT_HUB or not is_at(model, hub):
        return []
    try:
        return _texts(ServerApi.of_stranger(hub, api.proxies).get(f"/v2/{wanted.repository}/tags/list"), "tags")
    except Failed:
        return []


def _texts(answer: Any, member: str, of_each: str = "") -> list[str]:
    """The texts of a list in an answer; of objects in it, that member. Nothing of an answer that is otherwise."""
    listed = answer.get(member) if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        return []
    found = [one.get(of_each) if of_each and isinstance(one, dict) else one for one in listed]
    return [text for text in found if isinstance(text, str)]
