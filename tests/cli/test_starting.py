"""What the commands print that start a server."""

import pytest

from corral.cli.starting import local_lines
from corral.settings import Settings


@pytest.mark.parametrize(
    ("listen", "elsewhere"),
    [
        ("0.0.0.0", "        http://box:11434            from other machines\n"),
        ("[::]:8080", "        http://box:8080             from other machines\n"),
        ("127.0.0.1", ""),
        ("192.168.0.7", ""),
    ],
)
def test_server_on_all_addresses_says_what_other_machines_type(listen: str, elsewhere: str) -> None:
    local = Settings.from_env({"HOME": "/nonexistent", "OLLAMA_HOST": listen}).local
    facts = {
        "url": "http://localhost:1",
        "url_elsewhere": local.url_elsewhere("box"),
        "models": "~/m",
        "cloud": "https://hub",
        "asks": "off",
    }
    local_line, rest = local_lines(facts).split("\n", 1)
    assert local_line == "local   http://localhost:1          models in ~/m"
    assert rest == f"{elsewhere}cloud   https://hub"
