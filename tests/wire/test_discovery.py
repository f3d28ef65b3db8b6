"""Addresses of hubs, and what a discovery document may claim."""

import json

import pytest

from corral.wire.discovery import STRONG, is_loopback_host, origin_of, parse_discovery, parse_hub_address
from corral.wire.errors import CorralError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://Hub.Example.org", "https://hub.example.org"),
        ("https://hub.example.org:443/", "https://hub.example.org"),
        ("http://localhost:11435", "http://localhost:11435"),
        ("http://[::1]:80", "http://[::1]"),
        ("https://ollama.com:443", "https://ollama.com"),
    ],
)
def test_hub_address_is_written_in_one_way(text: str, expected: str) -> None:
    assert str(parse_hub_address(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hub.example.org",
        "ftp://hub.example.org",
        "https://",
        "https://user@hub.example.org",
        "https://hub.example.org/path",
        "https://hub.example.org?x=1",
        "https://hub.example.org#x",
        "https://hub.example.org:99999",
        "https://hub.example.org:x",
        "https://hüb.example.org",
        "https://hub.example.org\n",
        "https://hub example.org",
        "https://[::1",
    ],
)
def test_hub_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(CorralError) as refused:
        parse_hub_address(text)
    assert refused.value.code == "invalid"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("hub.localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("localhost.evil.com", False),
        ("127.0.0.1.nip.io", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_everything_else(host: str, expected: bool) -> None:
    assert is_loopback_host(host) is expected


@pytest.mark.parametrize(
    ("url", "is_private"),
    [
        ("https://hub.example.org", True),
        ("http://localhost:11435", True),
        ("http://hub.example.org", False),
        ("http://10.0.0.5:11435", False),
    ],
)
def test_private_line_is_tls_or_loopback(url: str, is_private: bool) -> None:
    assert parse_hub_address(url).is_private_line is is_private


def document(public_url: str, *signatures: str) -> bytes:
    return json.dumps({"corral": "1", "public_url": public_url, "signatures": signatures, "more": 1}).encode()


@pytest.mark.parametrize(
    ("hub", "public_url"),
    [
        ("http://127.0.0.1:11435", "http://localhost:11435"),
        ("http://localhost:11435", "http://[::1]:11435/"),
        ("https://hub.example.org", "https://hub.example.org:443"),
    ],
)
def test_discovery_of_the_same_place_gives_its_public_url(hub: str, public_url: str) -> None:
    found = parse_discovery(document(public_url, "stock", STRONG), parse_hub_address(hub))
    assert found == public_url.rstrip("/")


@pytest.mark.parametrize(
    ("hub", "public_url"),
    [
        ("https://evil.example", "https://hub.example.org"),
        ("https://hub.example.org", "http://hub.example.org"),
        ("http://localhost:1", "http://localhost:2"),
        ("http://localhost:1", "https://hub.example.org"),
        ("https://hub.example.org", "https://hub.example.org/path"),
    ],
)
def test_discovery_that_names_another_place_is_refused(hub: str, public_url: str) -> None:
    # A hub could otherwise collect signatures that another hub accepts (W6).
    with pytest.raises(CorralError) as refused:
        parse_discovery(document(public_url, STRONG), parse_hub_address(hub))
    assert refused.value.code == "invalid"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        document("https://hub.example.org", "stock"),
        document("https://hub.example.org"),
    ],
)
def test_discovery_without_the_strong_form_is_none(body: bytes) -> None:
    assert parse_discovery(body, parse_hub_address("https://hub.example.org")) is None


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "http://a b", "http://\x1b[2J", "//hub", "http://u:p@hub", "https://a..b", "https://.b"]
)
def test_origin_of_something_else_is_none(url: str) -> None:
    assert origin_of(url) is None
