"""Pages about models: the front page, the library, search, and one page per model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC
from corral.core.records import HostedModel, Principal
from corral.edges.asgi import Dialect, Endpoint, endpoint
from corral.edges.forms import member_of, query_of
from corral.edges.pages import Pages, format_size
from corral.hub.hosting import Hosting
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_NAMESPACE, cloud_tag, parse_name

_MAX_QUERY = 200


class _Namespace(Convertor[str]):
    """The first part of a model page's address. What other families of routes begin with is left to them, so that an unknown
    /api/ path is answered in their dialect and not by a page."""

    regex = r"(?!(?:api|v1|v2|static|admin|settings|connect)/)[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("namespace", _Namespace())


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRow:
    """One tag of a model's page. digest: shortened; empty for a model served elsewhere."""

    name: str
    digest: str
    parameters: str
    context: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A repository as pages show it. name: what callers ask for, of its first tag; cloud_name: the same for a local server."""

    title: str
    path: str
    name: str
    cloud_name: str
    summary: str
    is_public: bool
    tags: tuple[TagRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The model that commands to copy are written with."""

    name: str
    cloud: str


class Shelf:
    """The hosted models, as far as a visitor may see them."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting

    async def entries(self, caller: Principal | None) -> list[Entry]:
        """One per repository, by name."""
        groups: dict[str, list[HostedModel]] = {}
        for hosted in await self._hosting.list(caller):
            groups.setdefault(parse_name(hosted.name).key.repository, []).append(hosted)
        return sorted((_entry_of(group) for group in groups.values()), key=lambda entry: entry.title.lower())

    async def example(self, caller: Principal | None) -> Example:
        """A model that exists, if there is one; of the library rather than of somebody."""
        entries = sorted(await self.entries(caller), key=lambda entry: not entry.path.startswith(f"/{DEFAULT_NAMESPACE}/"))
        name = entries[0].name if entries else "smollm2:135m"
        return Example(name=name, cloud=cloud_tag(name))


def _entry_of(group: Sequence[HostedModel]) -> Entry:
    first, name = group[0], parse_name(group[0].name)
    return Entry(
        title=name.model if name.namespace == DEFAULT_NAMESPACE else name.repository,
        path=f"/{name.repository}",
        name=first.name,
        cloud_name=cloud_tag(first.name),
        summary=_summary_of(first),
        is_public=all(hosted.is_public for hosted in group),
        tags=tuple(_tag_of(hosted) for hosted in group),
    )


def _summary_of(hosted: HostedModel) -> str:
    """`Llama, 135M parameters, Q4_1 · 92 MB · 8k context · completion`, as far as it is known."""
    model = hosted.model
    if model is None:
        return "Served by another server on this hub's behalf"
    details = model.details
    parameters = f"{details.parameter_size} parameters" if details.parameter_size else ""
    what = ", ".join(part for part in (details.family, parameters, details.quantization_level) if part)
    context = f"{_context_of(hosted)} context" if details.context_length else ""
    size = format_size(model.size_bytes) if model.size_bytes else ""
    return " · ".join(part for part in (what, size, context, ", ".join(sorted(model.capabilities))) if part)


def _context_of(hosted: HostedModel) -> str:
    length = hosted.model.details.context_length if hosted.model else None
    if not length:
        return ""
    return f"{length // 1024}k" if length >= 1024 else str(length)


def _tag_of(hosted: HostedModel) -> TagRow:
    model = hosted.model
    return TagRow(
        name=parse_name(hosted.name).tag,
        digest=model.digest.hex[:12] if model else "",
        parameters=model.details.parameter_size if model else "",
        context=_context_of(hosted),
        size_bytes=model.size_bytes if model else 0,
    )


class ModelPages:
    """Handlers of the pages that anyone may open. Their routes end in wildcards, so they come last in the table."""

    def __init__(self, *, pages: Pages, shelf: Shelf) -> None:
        self._pages = pages
        self._shelf = shelf

    def endpoints(self) -> list[Endpoint]:
        """No forms here but the search, which is a GET."""
        html = Dialect.HTML
        return [
            endpoint("GET,HEAD", "/", self.home, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/library", self.library, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/search", self.search, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/{namespace:namespace}/{model}", self.model, PUBLIC, dialect=html),
        ]

    async def home(self, request: Request) -> Response:
        """What this hub is, what it runs, and how to reach it."""
        caller = member_of(request)
        models = await self._shelf.entries(caller)
        return self._pages.render("home.html", caller=caller, models=models[:10], example=await self._shelf.example(caller))

    async def library(self, request: Request) -> Response:
        """Every model the visitor may see."""
        caller = member_of(request)
        models = await self._shelf.entries(caller)
        return self._pages.render("models.html", caller=caller, title="Library", query="", models=models)

    async def search(self, request: Request) -> Response:
        """Models whose name or family holds every word of the query."""
        caller, query = member_of(request), query_of(request).text("q")[:_MAX_QUERY].strip()
        words = re.findall(r"[\w.-]+", query.lower())
        models = [
            entry
            for entry in await self._shelf.entries(caller)
            if all(word in f"{entry.path} {entry.summary}".lower() for word in words)
        ]
        return self._pages.render("models.html", caller=caller, title="Search", query=query, models=models)

    async def model(self, request: Request) -> Response:
        """One model. A private one is not there for others (T29). Raises: not_found."""
        caller = member_of(request)
        path = f"/{request.path_params['namespace']}/{request.path_params['model'].partition(':')[0]}".lower()
        entry = next((found for found in await self._shelf.entries(caller) if found.path.lower() == path), None)
        if entry is None:
            raise CorralError("not_found")
        return self._pages.render("model.html", caller=caller, entry=entry)
