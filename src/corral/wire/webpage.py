"""Web searches and web pages as Ollama's cloud gives them: requests, answers, and a page's HTML turned into text.

A page is hostile text, so the reader below goes over it once, from left to right, and keeps what it reads within bounds.
(html.parser and nh3 were tried: both need minutes for a megabyte of tags that nobody closes.) What comes out is text for a model
to read, without markup; nothing in it is obeyed here (security.md T122). Source: ollama docs/capabilities/web-search.mdx,
server/routes.go, fb30760.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin

import msgspec

from corral.wire.errors import CorralError
from corral.wire.native import decode

MAX_RESULTS = 10
_DEFAULT_RESULTS = 5
_MAX_QUERY, _MAX_URL = 2000, 2000
_MAX_TITLE, _MAX_SNIPPET = 300, 8000
#: Of a page's text; more than a model wants to read.
MAX_CONTENT = 200_000
_MAX_LINKS = 300
#: Of a page, in characters and in tags. What lies behind is not read.
_MAX_HTML, _MAX_TAGS = 2_000_000, 100_000


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/web_search. maxResults: what ollama-js sends in place of max_results."""

    query: str = ""
    max_results: int | None = None
    max_results_js: int | None = msgspec.field(default=None, name="maxResults")

    @property
    def count(self) -> int:
        """How many results are wanted, within bounds."""
        asked = self.max_results if self.max_results is not None else self.max_results_js
        return min(max(asked if asked is not None else _DEFAULT_RESULTS, 1), MAX_RESULTS)


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/web_fetch."""

    url: str = ""


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """One found page. content: an excerpt."""

    title: str
    url: str
    content: str


class WebPage(msgspec.Struct, frozen=True, kw_only=True):
    """A fetched page. links: absolute, http or https."""

    title: str
    content: str
    links: list[str]


def search_request(body: bytes) -> SearchRequest:
    """Raises: bad_request."""
    asked = decode(body, SearchRequest)
    if not asked.query.strip():
        raise CorralError("bad_request", "query is required")
    if len(asked.query) > _MAX_QUERY:
        raise CorralError("bad_request", f"query is longer than {_MAX_QUERY} characters")
    return asked


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────

# One reading of an address, so that no two readers can disagree about where it leads: no user name, no backslash, nothing that is
# not ASCII, and a host that is a plain name or address (T103).
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]{2,50}\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>[/?][!-\"$-\[\]-~]*)?(?:#[!-~]*)?",
    re.IGNORECASE,
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_PORTS = {"http": 80, "https": 443}
_ADDRESS = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}")


@dataclass(frozen=True, slots=True)
class PageAddress:
    """Where a page is. host: lower case, IPv6 in brackets. target: path and query."""

    scheme: str
    host: str
    port: int
    target: str

    def __str__(self) -> str:
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.target}"


def parse_page_address(text: str) -> PageAddress:
    """The address of a page; without a scheme https is meant. Raises: bad_request."""
    if "://" not in text:
        text = f"https://{text}"
    # Other letters stand in paths, and are sent encoded; in a host they are none that the pattern knows.
    found = _URL.fullmatch(_NOT_ASCII.sub(lambda letters: quote(letters[0]), text)) if len(text) <= _MAX_URL else None
    if found is None:
        raise CorralError("bad_request", "url must be the http or https address of a page, without a user name")
    scheme, host = found["scheme"].lower(), found["host"].lower()
    # Resolvers read 0177.1 and 2130706433 as addresses as well; whoever writes those wants to be misread.
    if re.fullmatch(r"[0-9.]+", host) and not _ADDRESS.fullmatch(host):
        raise CorralError("bad_request", "url must name its host plainly")
    port = int(found["port"] or _PORTS[scheme])
    if not 0 < port <= 65535:
        raise CorralError("bad_request", "url has a port that is none")
    rest = found["rest"] or "/"
    return PageAddress(scheme, host, port, rest if rest.startswith("/") else f"/{rest}")


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────

#: Their content is no text of the page.
_SKIPPED = frozenset(
    {"script", "style", "template", "svg", "noscript", "iframe", "object", "canvas", "math", "select", "textarea"}
)
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer"}
    | {"form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table"}
    | {"tbody", "thead", "tr", "ul"}
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
#: Begin after an empty line.
_APART = frozenset({*_HEADINGS, "p", "ul", "ol", "table", "pre", "blockquote"})
_DELIMITER = re.compile("[\"'>]")
_NAME = re.compile(r"[a-zA-Z][^\s/>]{0,40}")
_HREF = re.compile(r"[\s\"'/]href\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>]+))", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\r\n\f\v\xa0]+")
_ENDLESS_NUMBER = re.compile(r"&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?")
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def page_of_html(text: str, base: str) -> WebPage:
    """What a reader sees of an HTML page, and where it leads. base: its own address."""
    reader = _Reader(base)
    for piece, tag, inner in _pieces(text[:_MAX_HTML]):
        if not reader.take(piece, tag, inner):
            break
    return reader.page()


def page_of_text(text: str) -> WebPage:
    """A page that is text already."""
    return WebPage(title="", content=_clean(text[:MAX_CONTENT]), links=[])


def plain_result(title: object, url: object, content: object) -> SearchResult | None:
    """A search engine's row within bounds, without control characters; None for one that leads to no page."""
    try:
        address = str(parse_page_address(url)) if isinstance(url, str) and "://" in url else ""
    except CorralError:
        return None
    if not address:
        return None
    return SearchResult(title=_line(title, _MAX_TITLE), url=address, content=_line(content, _MAX_SNIPPET))


def _line(value: object, limit: int) -> str:
    return _SPACE.sub(" ", _clean(value[:limit])).strip() if isinstance(value, str) else ""


def _clean(text: str) -> str:
    return _UNSEEN.sub("", text.replace("\r\n", "\n"))


def _pieces(text: str) -> Iterator[tuple[str, str, str]]:
    """(text before a tag, the tag's name with `/` in front of an end tag, what is inside the tag). Every character is looked at a
    fixed number of times: what has no end ends the page."""
    position = start = 0
    for _ in range(_MAX_TAGS):
        opening = text.find("<", position)
        if opening < 0:
            yield text[start:], "", ""
            return
        if text.startswith("<!--", opening):
            yield text[start:opening], "", ""
            end = text.find("-->", opening + 4)
            if end < 0:
                return
            start = position = end + 3
            continue
        at = opening + 2 if text.startswith("</", opening) else opening + 1
        name = _NAME.match(text, at)
        if name is None and not text.startswith(("<!", "<?"), opening):
            position = opening + 1  # a lone `<` is text
            continue
        end = _tag_end(text, name.end() if name else at)
        if end < 0:
            yield text[start:opening], "", ""
            return
        tag = name[0].lower() if name else ""
        yield text[start:opening], ("/" if at == opening + 2 and tag else "") + tag, text[at:end]
        start = position = end + 1
        is_empty = tag in ("svg", "math") and text[end - 1] == "/"
        if tag in _SKIPPED and at == opening + 1 and not is_empty:
            closing = re.compile(f"</{tag}[\\s/>]", re.IGNORECASE).search(text, position)
            if closing is None:
                return
            start = position = closing.start()


def _tag_end(text: str, position: int) -> int:
    """Where the `>` of a tag is, outside of quotation marks; -1 when there is none."""
    while (found := _DELIMITER.search(text, position)) is not None:
        at = found.start()
        if found[0] == ">":
            return at
        position = at + 1
        # Only behind `=` a quotation mark begins a value.
        if text[max(0, at - 8) : at].rstrip().endswith("="):
            closing = text.find(found[0], position)
            if closing < 0:
                return -1
            position = closing + 1
    return -1


@dataclass(slots=True)
class _Reader:
    """Gathers a page. parts: of the line that is being gathered; mark: what stands before it."""

    base: str
    title: str = ""
    lines: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    mark: str = ""
    links: dict[str, None] = field(default_factory=dict)
    tried: int = 0
    size: int = 0
    is_in_title: bool = False
    has_title: bool = False
    is_preformatted: bool = False

    def take(self, piece: str, tag: str, inner: str) -> bool:
        """One piece of text and the tag behind it; False when there is enough."""
        if piece:
            self._text(html.unescape(_ENDLESS_NUMBER.sub("\ufffd", piece)))
        name = tag.removeprefix("/")
        if name == "title":
            self.has_title = self.has_title or tag == "/title"
            self.is_in_title = tag == "title"
        elif name == "pre":
            self._end_line()
            self.is_preformatted = tag == "pre"
        elif tag == "a":
            self._link(inner)
        if name in _BLOCKS:
            self._end_line()
            self.mark = "" if tag != name else _HEADINGS.get(name, "- " if name == "li" else "")
            if name in _APART and self.lines and self.lines[-1]:
                self.lines.append("")
        elif tag in ("td", "th") and self.parts:
            self.parts.append(" | ")
        return self.size <= MAX_CONTENT

    def page(self) -> WebPage:
        """What was gathered."""
        self._end_line()
        content = "\n".join(self.lines)[:MAX_CONTENT].strip("\n")
        return WebPage(title=_line(self.title, _MAX_TITLE), content=_clean(content), links=list(self.links))

    def _text(self, text: str) -> None:
        self.size += len(text) if self.is_preformatted else 1
        if self.is_in_title:
            if len(self.title) < _MAX_TITLE and not self.has_title:
                self.title += text[:_MAX_TITLE]
        elif self.is_preformatted:
            *ended, last = text.split("\n")
            for line in ended:
                self.parts.append(line)
                self.lines.append("".join(self.parts).rstrip())
                self.parts = []
            self.parts.append(last)
        else:
            text = _SPACE.sub(" ", text)
            if not self.parts or self.parts[-1].endswith(" "):
                text = text.lstrip()
            if text:
                self.parts.append(text)
                self.size += len(text)

    def _end_line(self) -> None:
        text = "".join(self.parts).rstrip() if self.is_preformatted else "".join(self.parts).strip()
        self.parts = []
        if text:
            self.lines.append(self.mark + text)

    def _link(self, inner: str) -> None:
        found = _HREF.search(inner[:4000])
        self.tried += 1
        if found is None or len(self.links) >= _MAX_LINKS or self.tried > 10 * _MAX_LINKS:
            return
        href = html.unescape(_ENDLESS_NUMBER.sub("", found[1] or found[2] or found[3] or "")).strip()[:_MAX_URL]
        try:
            self.links.setdefault(str(parse_page_address(urljoin(self.base, href))))
        except (CorralError, ValueError):
            return
