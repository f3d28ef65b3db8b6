"""Where the registry of a name is."""

import pytest

from corral.wire.errors import CorralError
from corral.wire.library import registry_url
from corral.wire.names import parse_name

HUB = "https://hub.example.org"


def url(text: str, *, hub: str = HUB, insecure: bool = False) -> str:
    return registry_url(parse_name(text), text, hub=hub, insecure=insecure)


@pytest.mark.parametrize(
    ("text", "hub", "found"),
    [
        ("tiny", HUB, HUB),
        ("alice/tiny", HUB, HUB),
        ("registry.ollama.ai/alice/tiny", HUB, HUB),
        ("Registry.Ollama.AI/alice/tiny", HUB, HUB),
        ("tiny", "https://ollama.com", "https://registry.ollama.ai"),
        ("tiny", "http://localhost:11435", "http://localhost:11435"),
        ("hub.example.org/alice/tiny", HUB, HUB),
        ("hub.example.org/alice/tiny", "http://localhost:11435", HUB),
        ("other.test:5000/alice/tiny", HUB, "https://other.test:5000"),
        ("localhost:5000/alice/tiny", HUB, "http://localhost:5000"),
        ("127.0.0.1:5000/alice/tiny", HUB, "http://127.0.0.1:5000"),
        ("x.localhost/alice/tiny", HUB, "http://x.localhost"),
        ("localhost:8443/alice/tiny", "https://localhost:8443", "https://localhost:8443"),
        ("https://localhost:5000/alice/tiny", HUB, "https://localhost:5000"),
        ("http://localhost:5000/alice/tiny", HUB, "http://localhost:5000"),
        ("HTTPS://other.test/alice/tiny", HUB, "https://other.test"),
    ],
)
def test_registry_is_the_names_host_and_the_hub_by_default(text: str, hub: str, found: str) -> None:
    assert url(text, hub=hub) == found


def test_insecure_means_plain_http_except_for_the_hub_in_use() -> None:
    assert url("other.test:5000/alice/tiny", insecure=True) == "http://other.test:5000"
    assert url("alice/tiny", insecure=True) == HUB


@pytest.mark.parametrize(
    ("text", "hub"),
    [("http://other.test/alice/tiny", HUB), ("alice/tiny", "http://hub.test"), ("hub.test/a/b", "http://hub.test")],
)
def test_plain_http_to_another_machine_is_refused_unless_asked_for(text: str, hub: str) -> None:
    with pytest.raises(CorralError) as refused:
        url(text, hub=hub)
    assert (refused.value.code, refused.value.message) == ("forbidden", "insecure protocol http")


@pytest.mark.parametrize("text", ["a:b:c/alice/tiny", "host:99999/alice/tiny", "host:x/alice/tiny", "ftp://host/alice/tiny"])
def test_host_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CorralError, match="invalid model name"):
        url(text)
