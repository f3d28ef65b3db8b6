"""Pages about models that anyone may open: the front page, listings, search, and one page per namespace and repository.

What is listed comes from the catalog, as far as the visitor reaches; hosted models that are in no repository the visitor may see
(an upstream's, or one whose weights stay private) stand beside it. What an owner may change is on pages of its own
(web_repository.py).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from markupsafe import Markup
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from corral.core.catalog import CatalogEntry, CatalogPage, Description, Facts, Kind, Order
from corral.core.policy import PUBLIC
from corral.core.records import HostedModel, Principal
from corral.core.registry import Right, Tag, Visibility
from corral.edges.asgi import Dialect, Endpoint, endpoint
from corral.edges.forms import Form, member_of, query_of
from corral.edges.markdown import render_readme
from corral.edges.pages import Pages, format_context
from corral.hub.accounts import Accounts
from corral.hub.catalog import MAX_QUERY, Catalog, ModelView, words_of
from corral.hub.hosting import Hosting
from corral.hub.quotas import Quotas
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_NAMESPACE, DEFAULT_TAG, cloud_tag, parse_name
from corral.wire.repositories import RepositoryName, parse_repository
from corral.wire.text import one_line
from corral.wire.units import format_size

_ON_FRONT_PAGE = 10
#: What an owner's form leaves in the address.
_NOTICES = {
    "public": "It is public. Anybody who reaches this hub can pull it.",
    "private": "It is private. Only its own people can pull it from now on.",
    "tag": "The tag is gone.",
    "deleted": "The model is deleted.",
}


class _Namespace(Convertor[str]):
    """The first part of a model page's address. What other families of routes begin with is left to them, so that an unknown
    /api/ path is answered in their dialect and not by a page."""

    regex = r"(?!(?:api|v1|v2|static|admin|settings|connect)(?:/|$))[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("namespace", _Namespace())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A repository, or a hosted model without one, in a listing. name, cloud_name: what callers of a hosted model ask for."""

    title: str
    path: str
    summary: str
    is_public: bool
    is_hosted: bool = False
    name: str = ""
    cloud_name: str = ""
    entry: CatalogEntry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRow:
    """One tag of a model's page. digest: shortened; empty for a model served elsewhere."""

    name: str
    digest: str
    facts: Facts | None
    size_bytes: int
    updated: Tag | None = None
    is_chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The model that commands to copy are written with."""

    name: str
    cloud: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A piece of a listing with the addresses around it. orders: (words, address, is the present one). more: empty at the end."""

    entries: Sequence[Entry]
    orders: Sequence[tuple[str, str, bool]]
    more: str
    is_first: bool


class Shelf:
    """The hosted models, as far as a visitor may see them. There are few: an operator names each."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting

    async def entries(self, caller: Principal | None) -> list[Entry]:
        """One per repository, by name."""
        return sorted((_hosted_entry(group) for group in (await self.groups(caller)).values()), key=lambda entry: entry.title)

    async def groups(self, caller: Principal | None) -> dict[str, list[HostedModel]]:
        """Repository in lower case -> what is hosted from it, or under its name."""
        groups: dict[str, list[HostedModel]] = {}
        for hosted in await self._hosting.list(caller):
            groups.setdefault(parse_name(hosted.name).key.repository, []).append(hosted)
        return groups

    async def example(self, caller: Principal | None) -> Example:
        """A model that exists, if there is one; of the library rather than of somebody."""
        entries = sorted(await self.entries(caller), key=lambda entry: not entry.path.startswith(f"/{DEFAULT_NAMESPACE}/"))
        name = entries[0].name if entries else "smollm2:135m"
        return Example(name=name, cloud=_cloud_name(name))


def facts_of(hosted: HostedModel) -> Facts | None:
    """What is known of a hosted model; nothing of one that another server runs."""
    model = hosted.model
    if model is None:
        return None
    return Facts(
        kind=Kind.MODEL,
        size_bytes=model.size_bytes,
        family=one_line(model.details.family),
        parameter_size=one_line(model.details.parameter_size),
        quantization=one_line(model.details.quantization_level),
        context_length=model.details.context_length,
        capabilities=model.capabilities,
    )


def summary_of(facts: Facts | None) -> str:
    """`llama, 135M parameters, Q4_1 · 92 MB · 8k context · completion`, as far as it is known."""
    if facts is None:
        return ""
    if facts.kind is not Kind.MODEL and facts.kind is not Kind.STUB:
        size = format_size(facts.size_bytes) if facts.size_bytes else ""
        return " · ".join(part for part in (_KIND_WORDS[facts.kind], size) if part)
    parameters = f"{facts.parameter_size} parameters" if facts.parameter_size else ""
    what = ", ".join(part for part in (facts.family, parameters, facts.quantization) if part)
    context = f"{format_context(facts.context_length)} context" if facts.context_length else ""
    size = format_size(facts.size_bytes) if facts.size_bytes else ""
    return " · ".join(part for part in (what, size, context, ", ".join(sorted(facts.capabilities))) if part)


_KIND_WORDS = {
    Kind.WAITING: "just pushed",
    Kind.ARTIFACT: "not a model",
    Kind.UNREADABLE: "a model that cannot be read",
}


def title_of(repository: str) -> str:
    """A repository as people say it: models of the library go by their own name."""
    return repository.removeprefix(f"{DEFAULT_NAMESPACE}/")


def _cloud_name(hosted: str) -> str:
    # As everything else spells it: `tiny:cloud`, whose stub would lie beside that of `tiny:latest-cloud`.
    return cloud_tag(hosted.removesuffix(f":{DEFAULT_TAG}"))


def path_of(repository: str) -> str:
    """The address of its page."""
    return "/" + quote(repository)


def _hosted_entry(group: Sequence[HostedModel]) -> Entry:
    first, name = group[0], parse_name(group[0].name)
    return Entry(
        title=title_of(name.repository),
        path=path_of(name.repository),
        summary=summary_of(facts_of(first)) or "Served by another server on this hub's behalf",
        is_public=all(hosted.is_public for hosted in group),
        is_hosted=True,
        name=first.name,
        cloud_name=_cloud_name(first.name),
    )


def _catalog_entry(found: CatalogEntry, hosted: Mapping[str, object]) -> Entry:
    repository = f"{found.namespace}/{found.name}"
    return Entry(
        title=title_of(repository),
        path=path_of(repository),
        summary=summary_of(found.facts) if found.facts else "No tag yet: its first push did not end, or was refused",
        is_public=found.visibility is Visibility.PUBLIC,
        is_hosted=repository.lower() in hosted,
        entry=found,
    )


class ModelPages:
    """Handlers of the pages that anyone may open. Their routes end in wildcards, so they come last in the table."""

    def __init__(
        self, *, pages: Pages, accounts: Accounts, quotas: Quotas, shelf: Shelf, catalog: Catalog, public_url: str
    ) -> None:
        self._pages = pages
        self._accounts = accounts
        self._quotas = quotas
        self._shelf = shelf
        self._catalog = catalog
        self._commands = Commands(public_url)

    def endpoints(self) -> list[Endpoint]:
        """No forms here but the search, which is a GET."""
        html = Dialect.HTML
        return [
            endpoint("GET,HEAD", "/", self.home, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/library", self.library, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/search", self.search, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/{namespace:namespace}", self.namespace, PUBLIC, dialect=html),
            endpoint("GET,HEAD", "/{namespace:namespace}/{model:path}", self.model, PUBLIC, dialect=html),
        ]

    async def home(self, request: Request) -> Response:
        """What this hub is, what it runs and holds, and how to reach it."""
        caller = member_of(request)
        hosted = await self._shelf.groups(caller)
        newest = [_catalog_entry(found, hosted) for found in (await self._catalog.browse(caller)).entries]
        return self._pages.render(
            "home.html",
            caller=caller,
            models=(await self._shelf.entries(caller))[:_ON_FRONT_PAGE],
            newest=[entry for entry in newest if not entry.is_hosted][:_ON_FRONT_PAGE],
            example=await self._shelf.example(caller),
            is_new=await self._accounts.is_new(),
            notice="Your account is deleted." if query_of(request).text("done") == "deleted" else "",
        )

    async def library(self, request: Request) -> Response:
        """Everything the visitor may see."""
        caller, query = member_of(request), query_of(request)
        page = await self._catalog.browse(caller, order=_order_of(query), after=query.text("after"))
        listing = await self._listing(caller, page, query, "/library")
        return self._pages.render("models.html", caller=caller, title="Library", query="", listing=listing, notice=_notice(query))

    async def search(self, request: Request) -> Response:
        """What holds every word of the query in its names, tags or facts."""
        caller, query = member_of(request), query_of(request)
        text = query.text("q")[:MAX_QUERY].strip()
        words = words_of(text)
        if not words:
            page = CatalogPage(entries=()) if text else await self._catalog.browse(caller, order=_order_of(query))
        else:
            page = await self._catalog.search(caller, text, order=_order_of(query), after=query.text("after"))
        listing = await self._listing(caller, page, query, "/search", words=words)
        return self._pages.render("models.html", caller=caller, title="Search", query=text, listing=listing, notice="")

    async def namespace(self, request: Request) -> Response:
        """What somebody has published. Whether there is such an account is nobody's business: without anything that the visitor
        may see there is no page, except for its owner. Raises: not_found."""
        caller, query = member_of(request), query_of(request)
        namespace = request.path_params["namespace"]
        is_own = caller is not None and caller.account.name.lower() == namespace.lower()
        page = await self._catalog.browse(caller, order=_order_of(query), namespace=namespace, after=query.text("after"))
        if not page.entries and not is_own:
            raise CorralError("not_found")
        shown = page.entries[0].namespace if page.entries else namespace
        listing = await self._listing(caller, page, query, path_of(shown), namespace=namespace)
        return self._pages.render(
            "namespace.html",
            caller=caller,
            namespace=shown,
            listing=listing,
            storage=await self._quotas.use_of(namespace) if is_own else None,
            notice=_notice(query),
        )

    async def model(self, request: Request) -> Response:
        """One repository, or one hosted model. A private one is not there for others (T29). Raises: not_found."""
        caller, query = member_of(request), query_of(request)
        path, _, tag = request.path_params["model"].partition(":")
        name = _name_of(f"{request.path_params['namespace']}/{path}")
        hosted = (await self._shelf.groups(caller)).get(str(name.key), [])
        view = await self._catalog.view(name, caller, tag=tag, after=query.text("after"))
        if view is None and (not hosted or not _is_hosted(tag, hosted)):
            raise CorralError("not_found")
        if view is None:
            return self._hosted_page(caller, hosted)
        readme = await asyncio.to_thread(render_readme, view.readme) if view.readme else Markup()
        described = view.descriptions.get(view.chosen.digest) if view.chosen else None
        return self._pages.render(
            "model.html",
            caller=caller,
            view=view,
            title=title_of(view.repository.path),
            path=path_of(view.repository.path),
            base=f"/settings/models{path_of(view.repository.path)}",
            namespace_path=path_of(view.repository.namespace),
            notice=_notice(query),
            summary=summary_of(described.facts) if described else "",
            described=described,
            tags=_tag_rows(view),
            more=_address(path_of(view.repository.path), {"after": view.more_tags}) if view.more_tags else "",
            pull=self._commands.of(view, described),
            hosted=_hosted_entry(hosted) if hosted else None,
            readme=readme,
            is_owner=Right.DELETE in view.rights,
            may_push=Right.PUSH in view.rights,
        )

    def _hosted_page(self, caller: Principal | None, hosted: Sequence[HostedModel]) -> Response:
        rows = [
            TagRow(
                name=parse_name(model.name).tag,
                digest=model.model.digest.hex[:12] if model.model else "",
                facts=facts_of(model),
                size_bytes=model.model.size_bytes if model.model else 0,
            )
            for model in hosted
        ]
        return self._pages.render("hosted.html", caller=caller, entry=_hosted_entry(hosted), tags=rows)

    async def _listing(
        self,
        caller: Principal | None,
        page: CatalogPage,
        query: Form,
        path: str,
        *,
        words: Sequence[str] = (),
        namespace: str = "",
    ) -> Listing:
        hosted = await self._shelf.groups(caller)
        is_first = not query.text("after")
        beside = await self._beside(caller, hosted, words, namespace) if is_first else []
        kept = {"q": query.text("q")[:MAX_QUERY]} if query.text("q") else {}
        present = _order_of(query)
        return Listing(
            entries=[*beside, *(_catalog_entry(found, hosted) for found in page.entries)],
            orders=[
                (words_, _address(path, kept | ({} if order is Order.NEWEST else {"order": order})), order is present)
                for order, words_ in ((Order.NEWEST, "Newest"), (Order.MOST_PULLED, "Most pulled"))
            ],
            more=_address(path, kept | {"order": present, "after": page.after}) if page.after else "",
            is_first=is_first,
        )

    async def _beside(
        self, caller: Principal | None, hosted: Mapping[str, list[HostedModel]], words: Sequence[str], namespace: str
    ) -> list[Entry]:
        """Hosted models that are in no repository the visitor may see."""
        found = []
        for repository, group in sorted(hosted.items()):
            entry = _hosted_entry(group)
            pieces = words_of(f"{entry.path} {entry.summary}"[:MAX_QUERY])
            is_asked = all(any(piece.startswith(word) for piece in pieces) for word in words)
            is_here = not namespace or repository.startswith(f"{namespace.lower()}/")
            if is_asked and is_here and not await self._catalog.is_visible(parse_repository(repository), caller):
                found.append(entry)
        return found


class Commands:
    """Commands that fetch a repository, for whoever copies them to another machine."""

    def __init__(self, public_url: str) -> None:
        parts = urlsplit(public_url)
        self._host = parts.netloc
        self._insecure = "--insecure " if parts.scheme == "http" else ""

    def of(self, view: ModelView, described: Description | None) -> list[tuple[str, str]]:
        """(whose command, the command), the first one first; none for a repository without a tag."""
        if view.chosen is None:
            return []
        tag = view.chosen.name
        full = f"{self._host}/{view.repository.path}"
        if described is not None and described.facts.kind is Kind.ARTIFACT:
            plain = "--plain-http " if self._insecure else ""
            return [("oras", f"oras pull {plain}{full}:{tag}")]
        name = full if tag == DEFAULT_TAG else f"{full}:{tag}"
        commands = [("corral", f"corral pull {name}"), ("ollama", f"ollama pull {self._insecure}{name}")]
        # Ollama's own command knows names of two parts.
        return commands if "/" not in view.repository.name else commands[:1]


def _is_hosted(tag: str, hosted: Sequence[HostedModel]) -> bool:
    return not tag or any(parse_name(model.name).tag.lower() == tag.lower() for model in hosted)


def _tag_rows(view: ModelView) -> list[TagRow]:
    rows = []
    listed = view.tags if view.chosen is None or view.chosen in view.tags else (view.chosen, *view.tags)
    for tag in listed:
        described = view.descriptions.get(tag.digest)
        facts = described.facts if described else None
        rows.append(
            TagRow(
                name=tag.name,
                digest=tag.digest.hex[:12],
                facts=facts,
                size_bytes=tag.size_bytes or (facts.size_bytes if facts else 0),
                updated=tag,
                is_chosen=tag == view.chosen,
            )
        )
    return rows


def _name_of(text: str) -> RepositoryName:
    """The repository of an address. Raises: not_found for what cannot be one."""
    try:
        return parse_repository(text)
    except CorralError as error:
        raise CorralError("not_found") from error


def _notice(query: Form) -> str:
    """What the address says was done: it chooses a sentence, it never brings one."""
    return _NOTICES.get(query.text("done"), "")


def _order_of(query: Form) -> Order:
    """The order of an address; an unknown one is the usual."""
    return Order.MOST_PULLED if query.text("order") == Order.MOST_PULLED else Order.NEWEST


def _address(path: str, fields: Mapping[str, str]) -> str:
    return f"{path}?{urlencode(fields)}" if fields else path
