"""The registry's own names: which Host headers are ours, and how they are spelled back."""

import pytest

from corral.wire.hosts import called_url, other_spelling

PUBLIC, LOOPBACK = "https://hub.example.org", "http://localhost:11435"


@pytest.mark.parametrize(
    ("public", "host"),
    [
        (PUBLIC, "hub.example.org"),
        (PUBLIC, "HUB.example.org"),
        (PUBLIC, "hub.example.org:443"),
        (LOOPBACK, "localhost:11435"),
        (LOOPBACK, "127.0.0.1:11435"),
        (LOOPBACK, "[::1]:11435"),
    ],
)
def test_t023_called_url_of_our_own_name_is_echoed_as_written(public: str, host: str) -> None:
    assert called_url(public, host) == f"{public.partition('://')[0]}://{host}"


@pytest.mark.parametrize(
    ("public", "host"),
    [
        (PUBLIC, "evil.example.org"),
        (PUBLIC, "hub.example.org:8443"),
        (PUBLIC, "hub.example.org.evil.org"),
        (PUBLIC, "localhost"),
        (LOOPBACK, "localhost"),
        (LOOPBACK, "localhost:11436"),
        (LOOPBACK, "hub.example.org:11435"),
        (LOOPBACK, ""),
        (LOOPBACK, "[::1"),
        (LOOPBACK, "a" * 400),
        (PUBLIC, "user@hub.example.org"),
        (PUBLIC, "hub.example.org/x"),
    ],
)
def test_t023_called_url_of_another_name_is_none(public: str, host: str) -> None:
    assert called_url(public, host) is None


@pytest.mark.parametrize(
    ("url", "other"),
    [
        ("http://localhost:11435", "http://Localhost:11435"),
        ("http://localhost", "http://Localhost"),
        ("http://127.0.0.1:11435", "http://localhost:11435"),
        ("https://hub.example.org", "https://Hub.example.org"),
        ("https://Hub.example.org:443", "https://hub.example.org:443"),
        ("http://127.0.0.2:1", None),
        ("http://[::1]:1", None),
    ],
)
def test_other_spelling_is_the_same_place_by_another_host(url: str, other: str | None) -> None:
    assert other_spelling(url) == other
