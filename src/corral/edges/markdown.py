"""README text as HTML that can do nothing: markdown is rendered first, and what comes out is cleaned (T81).

Cleaning comes last, so that no way of writing markdown leads around it. Only tags that carry text are left; links get
`rel="noopener nofollow"`, and a picture becomes a link to it, because a page of this hub loads nothing from elsewhere.
"""

from collections.abc import MutableMapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from markupsafe import Markup

#: What is shown of a README. Rendering takes about a second per megabyte.
MAX_RENDERED = 64 << 10
_TAGS = frozenset(
    """
    a abbr blockquote br code dd del details dl dt em h3 h4 h5 h6 hr i b kbd li ol p pre s samp strong sub summary sup table tbody
    td tfoot th thead tr u ul var
    """.split()  # noqa: SIM905 - easier to read than forty quoted words
)
#: What a picture is marked with that is the words of a link.
_IN_LINK = "is_in_link"
#: A page has its own h1 and h2.
_SHIFT = 2


class _Tools(NamedTuple):
    """The two libraries, set up. Made when the first README is shown: loading them takes longer than rendering one."""

    markdown: Any
    cleaner: Any


@lru_cache(maxsize=128)
def render_readme(text: str) -> Markup:
    """The text as HTML. Blocks for long texts; async callers use a thread."""
    markdown, cleaner = _tools()
    cut = text[:MAX_RENDERED]
    return Markup(cleaner.clean(markdown.render(cut)))  # noqa: S704 - this is the one place that makes HTML safe


@cache
def _tools() -> _Tools:
    import nh3
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", _render_image)
    markdown.core.ruler.push("lower_headings", _lower_headings)
    markdown.core.ruler.push("mark_linked_images", _mark_linked_images)
    cleaner = nh3.Cleaner(
        tags=set(_TAGS),
        clean_content_tags={"script", "style", "title", "iframe", "noscript", "template", "svg", "math"},
        attributes={"a": {"href", "title"}, "abbr": {"title"}, "ol": {"start"}, "td": {"colspan"}, "th": {"colspan"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener nofollow",
        generic_attribute_prefixes=set(),
    )
    return _Tools(markdown, cleaner)


def _render_image(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: MutableMapping[str, Any]) -> str:
    from markdown_it.common.utils import escapeHtml

    token = tokens[index]
    words = renderer.renderInlineAsText(token.children or [], options, env) or "picture"
    if token.meta.get(_IN_LINK):
        return str(escapeHtml(words))
    return f'<a href="{escapeHtml(str(token.attrGet("src") or ""))}">{escapeHtml(words)}</a>'


def _mark_linked_images(state: Any) -> None:
    # Here, in one go: a picture that looked for itself what comes before it would make many of them take the square of the time.
    for token in state.tokens:
        depth = 0
        for inner in token.children or ():
            if inner.type == "image":
                inner.meta[_IN_LINK] = depth > 0
            elif inner.type in ("link_open", "link_close"):
                depth += inner.nesting


def _lower_headings(state: Any) -> None:
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + _SHIFT)}"
