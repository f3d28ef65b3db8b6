"""Which requests go out through a proxy."""

import pytest

from corral.wire.proxies import ProxyRules

PROXY, SECURE = "http://proxy:3128", "http://secure:3128"


def rules(*exceptions: str) -> ProxyRules:
    return ProxyRules(http=PROXY, https=SECURE, exceptions=exceptions)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.org/x", PROXY),
        ("https://example.org/x", SECURE),
        ("http://localhost:11435", None),
        ("http://hub.localhost", None),
        ("http://127.0.0.9", None),
        ("http://[::1]:80", None),
        ("ftp://example.org", PROXY),
        ("http:///x", None),
    ],
)
def test_proxy_is_that_of_the_scheme_and_never_for_this_machine(url: str, expected: str | None) -> None:
    assert rules().proxy_of(url) == expected


def test_no_proxy_is_used_unless_one_is_named() -> None:
    assert ProxyRules(https=SECURE).proxy_of("http://example.org") is None
    assert ProxyRules().proxy_of("https://example.org") is None


@pytest.mark.parametrize(
    ("word", "url", "is_excepted"),
    [
        ("*", "https://example.org", True),
        ("example.org", "https://example.org", True),
        ("EXAMPLE.org", "https://hub.example.ORG", True),
        (".example.org", "https://example.org", False),
        (".example.org", "https://hub.example.org", True),
        ("*.example.org", "https://hub.example.org", True),
        ("example.org", "https://badexample.org", False),
        ("example.org:8443", "https://example.org", False),
        ("example.org:8443", "https://example.org:8443", True),
        ("example.org:443", "https://example.org", True),
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("10.0.0.0/8", "http://example.org", False),
        ("10.1.2.3", "http://10.1.2.3:99", True),
        ("10.1.2.3:98", "http://10.1.2.3:99", False),
        ("[fd00::1]:80", "http://[fd00::1]", True),
        ("fd00::/8", "http://[fd00::1]", True),
        ("10.0.0.0/99", "http://10.0.0.1", False),
        ("", "http://example.org", False),
        (".", "http://example.org", False),
    ],
)
def test_exception_covers_hosts_and_networks(word: str, url: str, is_excepted: bool) -> None:
    assert (rules("other.example", word).proxy_of(url) is None) == is_excepted


def test_password_of_a_proxy_is_not_shown() -> None:
    assert "hunter2" not in repr(ProxyRules(http="http://ada:hunter2@proxy", https="http://ada:hunter2@proxy"))
