"""README text as HTML: it keeps its structure, and can do nothing (T81)."""

import re
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks import XSS
from corral.edges.markdown import MAX_RENDERED, render_readme

_TAG = re.compile(r"<([a-zA-Z!/?][^>\s]*)((?:\s[^>]*)?)>")
_HARMLESS = frozenset(
    "a abbr blockquote br code dd del details dl dt em h3 h4 h5 h6 hr i b kbd li ol p pre s samp strong sub summary sup".split()  # noqa: SIM905 - easier to read than a list of quoted words
) | frozenset("table tbody td tfoot th thead tr u ul var".split())  # noqa: SIM905
_ATTRIBUTES = re.compile(r'\s(?:href="(?:https?:|mailto:|[/#?]|[^":]*")|rel="noopener nofollow"|title="|start="|colspan=")')


def check_harmless(html: str) -> None:
    """Only tags of text, and on them only the few attributes that do nothing."""
    for name, attributes in _TAG.findall(html):
        assert name.strip("/") in _HARMLESS, html
        for attribute in re.findall(r'\s[a-z-]+="[^"]*"', attributes):
            assert _ATTRIBUTES.match(attribute), html


@pytest.mark.parametrize("attack", XSS)
def test_t81_attack_in_a_readme_is_text_or_nothing(attack: str) -> None:
    check_harmless(render_readme(attack))
    check_harmless(render_readme(f"before {attack} after\n\n> {attack}\n\n- {attack}\n"))


@given(st.text(alphabet="<>/\"'= \n`*_[]()!#&;:abhefrscipt-|", max_size=80))
def test_t81_any_text_is_harmless(text: str) -> None:
    check_harmless(render_readme(text))


def test_structure_of_a_readme_is_kept() -> None:
    html = render_readme("# A\n\n## B\n\n###### C\n\n- x\n- y\n\n| a |\n|-|\n| b |\n\n```py\nx<1\n```\n\n~~gone~~ **b** *i* `c`")
    for piece in (
        "<h3>A</h3>",
        "<h4>B</h4>",
        "<h6>C</h6>",
        "<li>x</li>",
        "<td>b</td>",
        "<pre><code>x&lt;1",
        "<s>gone</s>",
        "<em>i</em>",
    ):
        assert piece in html


def test_links_lead_away_without_taking_anything_along() -> None:
    assert render_readme("[a](https://a.example)").strip() == '<p><a href="https://a.example" rel="noopener nofollow">a</a></p>'


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("![loss](https://a.example/x.png)", '<a href="https://a.example/x.png" rel="noopener nofollow">loss</a>'),
        ("![](https://a.example/x.png)", '<a href="https://a.example/x.png" rel="noopener nofollow">picture</a>'),
        ("[![ci](https://a.example/x.png)](https://b.example)", '<a href="https://b.example" rel="noopener nofollow">ci</a>'),
        ('<img src="https://a.example/x.png" alt="x">', ""),
    ],
)
def test_t81_picture_is_a_link_to_it_and_never_loaded(text: str, html: str) -> None:
    assert render_readme(text).strip().removeprefix("<p>").removesuffix("</p>") == html


def test_end_of_a_very_long_readme_is_not_shown() -> None:
    assert "the end" not in render_readme("word " * (MAX_RENDERED // 5) + "the end")


@pytest.mark.parametrize("piece", ["![", "[a](", "*a ", "<", "- ", "|a", "`", "> "])
def test_t81_readme_made_to_be_slow_is_bounded(piece: str) -> None:
    started = process_time()
    render_readme(piece * 80_000)
    assert process_time() - started < 10


def test_t81_many_pictures_take_the_time_of_as_many_links() -> None:
    def seconds(piece: str) -> float:
        started = process_time()
        render_readme(piece * (MAX_RENDERED // len(piece)))
        return process_time() - started

    # Eight times as long when each of them looked through all that comes before it.
    assert seconds("![a](b)") < 4 * seconds("[ab](c)")
