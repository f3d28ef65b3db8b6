"""Names of repositories and tags: what either kind of client writes is kept; anything else gets a coded error."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.repositories import RepositoryName, is_reserved_tag, is_tag, parse_repository, parse_tag

NAMES = st.one_of(
    st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}\Z"),
    st.from_regex(r"\A[a-z0-9]{1,9}((\.|_|__|-{1,3})[a-z0-9]{1,9})?(/[a-z0-9]{1,9}((\.|_|__|-{1,3})[a-z0-9]{1,9})?){1,6}\Z"),
)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CorralError) as caught:
        call()
    return caught.value.code


@given(NAMES)
def test_name_of_either_grammar_is_kept_as_written(text: str) -> None:
    name = parse_repository(text)
    assert str(name) == text
    assert "/" not in name.namespace


@pytest.mark.parametrize(
    ("text", "namespace", "name"),
    [
        ("ana/tiny", "ana", "tiny"),
        ("Ana/_x.", "Ana", "_x."),
        ("ana/a--b", "ana", "a--b"),
        ("ana/blobs/uploads/tags", "ana", "blobs/uploads/tags"),
        ("my.org/a__b/c", "my.org", "a__b/c"),
        ("library/llama3.2", "library", "llama3.2"),
    ],
)
def test_name_is_split_at_its_first_slash(text: str, namespace: str, name: str) -> None:
    assert parse_repository(text) == RepositoryName(namespace, name)


def test_names_that_differ_by_case_have_one_key() -> None:
    assert parse_repository("Ana/Tiny").key == parse_repository("ana/tINY").key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "tiny",
        "ana/",
        "/tiny",
        "ana//tiny",
        "../tiny",
        "ana/..",
        "a/../b",
        "ana/.",
        "ana/./b",
        "ana/.tiny",
        "ana/-tiny",
        "-ana/tiny",
        "ana/%2e%2e",
        "ana%2ftiny",
        "ana\\tiny",
        "ana/ti\\ny",
        "ana/tiny\n",
        "ana/tiny\x00",
        "ana/tiny ",
        " ana/tiny",
        "ana/tіny",  # a Cyrillic letter
        "ana/ｔiny",  # a full-width letter
        "aſa/tiny",  # lower-cases to an ASCII letter elsewhere
        "ana/b/C",
        "ana/b/_uploads",
        "ana/b/c.",
        "host:5000/ana/tiny",
        "ana/tiny:latest",
        "a" * 81 + "/" + "A",
        "A/" + "b" * 81,
        "a/" + "b" * 254,
        "a/" * 5000 + "b",
    ],
)
def test_f09_t034_name_of_another_grammar_is_refused(text: str) -> None:
    assert refused(lambda: parse_repository(text)) == "name_invalid"


@given(st.text(max_size=300))
def test_t034_any_text_is_a_name_that_stays_one_or_is_refused(text: str) -> None:
    try:
        name = parse_repository(text)
    except CorralError as error:
        assert error.code == "name_invalid"  # noqa: PT017 - either is right
        return
    assert str(name) == text
    assert text.isascii()
    assert not {"", ".", ".."} & set(text.split("/"))


def test_f09_long_name_is_refused_quickly() -> None:
    start = time.process_time()
    for text in ("a-" * 100_000, "a/" + "-" * 253, "a/" + "a-" * 126, "a" * 10_000_000):
        assert refused(lambda text=text: parse_repository(text)) == "name_invalid"
    assert time.process_time() - start < 1


@pytest.mark.parametrize("tag", ["latest", "_", "8B-q4_K_M", "1.0.", "a" * 128, "sha256-" + "a" * 64])
def test_tag_of_either_grammar_is_taken(tag: str) -> None:
    assert is_tag(tag)
    assert parse_tag(tag) == tag


@pytest.mark.parametrize(
    "tag", ["", ".x", "-x", "a" * 129, "a/b", "a:b", "a b", "a\n", "ä", "..", ".INVALID_MANIFEST_NAME", "sha256:" + "a" * 64]
)
def test_f09_tag_of_another_grammar_is_refused(tag: str) -> None:
    assert not is_tag(tag)
    assert refused(lambda: parse_tag(tag)) == "manifest_invalid"


@pytest.mark.parametrize(
    ("tag", "is_reserved"),
    [
        ("local", True),
        ("LOCAL", True),
        ("cloud", True),
        ("120b-cloud", True),
        ("120b-Cloud", True),
        ("latest", False),
        ("cloudy", False),
        ("my-local", False),
        ("cloud-1", False),
    ],
)
def test_tag_that_pullers_rewrite_is_reserved(tag: str, is_reserved: bool) -> None:
    assert is_reserved_tag(tag) is is_reserved
