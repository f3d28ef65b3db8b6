"""The rules of a mirror: what they allow, what things are called upstream, and which are refused."""

import time

import pytest

from corral.wire.errors import CorralError
from corral.wire.mirrors import MirrorRule, parse_mirror_rule, upstream_of
from corral.wire.repositories import parse_repository

OLLAMA = "library/*=https://registry.ollama.ai"


@pytest.mark.parametrize(
    ("rule", "name", "base_url", "path"),
    [
        (OLLAMA, "library/tiny", "https://registry.ollama.ai", "library/tiny"),
        (OLLAMA, "Library/Tiny", "https://registry.ollama.ai", "Library/Tiny"),
        ("docker.io/*=https://registry-1.docker.io/", "docker.io/a/b", "https://registry-1.docker.io", "a/b"),
        ("friends/tiny*=https://hub.example:8443/ana/", "friends/tiny-1", "https://hub.example:8443", "ana/tiny-1"),
        ("friends/tiny=http://127.0.0.1:5000/x/y", "friends/tiny", "http://127.0.0.1:5000", "x/y/tiny"),
        (" Library/* = https://Registry.Example ", "library/tiny", "https://registry.example", "library/tiny"),
        ("library/a*c*e=https://r.example", "library/abcde", "https://r.example", "library/abcde"),
    ],
)
def test_rule_says_what_a_repository_is_called_upstream(rule: str, name: str, base_url: str, path: str) -> None:
    assert upstream_of([parse_mirror_rule(rule)], parse_repository(name)) == (base_url, path)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (OLLAMA, "ana/tiny"),
        (OLLAMA, "library2/tiny"),
        ("library/tiny=https://r.example", "library/tiny2"),
        ("library/tiny*=https://r.example", "library/xtiny"),
        ("library/t.ny=https://r.example", "library/tony"),
    ],
)
def test_what_no_rule_is_about_is_not_mirrored(rule: str, name: str) -> None:
    assert upstream_of([parse_mirror_rule(rule)], parse_repository(name)) is None


def test_first_rule_that_matches_counts() -> None:
    rules = [parse_mirror_rule("library/tiny=https://a.example"), parse_mirror_rule("library/*=https://b.example")]
    found = [upstream_of(rules, parse_repository(name)) for name in ("library/tiny", "library/other")]
    assert found == [("https://a.example", "library/tiny"), ("https://b.example", "library/other")]


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "library",
        "library/*",
        "library/*=",
        "=https://r.example",
        "*=https://r.example",
        "*/*=https://r.example",
        "lib*/x=https://r.example",
        "library/=https://r.example",
        "library/../x=https://r.example",
        "library/.x=https://r.example",
        "library/a//b=https://r.example",
        "library/a*b*c*d*e=https://r.example",
        "library/ä=https://r.example",
        "library/*=r.example",
        "library/*=ftp://r.example",
        "library/*=https://",
        "library/*=https://user:secret@r.example",
        "library/*=https://r.example?x=1",
        "library/*=https://r.example#x",
        "library/*=https://r.example:0",
        "library/*=https://r.example:99999",
        "library/*=https://[::1",
        "library/*=https://r.example/../x",
        "library/*=https://r.example/a//b",
        "library/*=https://r.example/%2e%2e",
        "library/*=https://r.exämple",
        "library/*=https://r.example/\x00",
    ],
)
def test_t093_rule_that_is_none_is_refused_without_repeating_it(rule: str) -> None:
    with pytest.raises(CorralError) as caught:
        parse_mirror_rule(rule)
    assert caught.value.code == "invalid"
    assert "secret" not in caught.value.message


def test_pattern_of_many_stars_is_matched_quickly() -> None:
    rule = MirrorRule(namespace="library", pattern="a*a*a*b", base_url="https://r.example")
    start = time.process_time()
    assert rule.path_of(parse_repository("library/" + "a" * 80)) is None
    assert time.process_time() - start < 0.1
