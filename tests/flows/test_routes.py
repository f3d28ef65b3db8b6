"""T112: what answers without credentials is exactly what public_routes.txt says, and what is not in it really refuses."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.edges.asgi import Endpoint
from flows.stack import Stack, call
from tooling import tool_module

LIST = Path(__file__).with_name("public_routes.txt")


@pytest.fixture(scope="module")
def tables() -> dict[str, list[Endpoint]]:
    """Server -> its whole route table."""
    tool = tool_module("make_reference")
    return {"hub": tool.hub_endpoints(), "local": tool.local_endpoints()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub that has an account."""
    with Stack(tmp_path_factory.mktemp("hub")) as stack:
        stack.add_account()
        stack.begin("hub", "serve").wait_for("hub +http")
        yield stack.hub_url


def lines_of(server: str, row: Endpoint) -> list[str]:
    shape = tool_module("make_reference").shape_of(row.path)
    return [f"{server} {method} {shape}" for method in sorted(row.methods)]


def test_t112_public_routes_are_those_of_the_list(tables: dict[str, list[Endpoint]]) -> None:
    found = {line for server, rows in tables.items() for row in rows if row.access.is_public for line in lines_of(server, row)}
    listed = {line for line in LIST.read_text().splitlines() if line and not line.startswith("#")}
    assert found == listed, "a route changed hands: is that meant? Then change public_routes.txt in the same commit"


def test_t112_every_other_route_of_the_hub_refuses_a_stranger(hub: str, tables: dict[str, list[Endpoint]]) -> None:
    for row in tables["hub"]:
        if row.access.is_public:
            continue
        for method in sorted(row.methods - {"HEAD"}):
            path = re.sub(r"\{[^}]+\}", "x", row.path)
            answer = call(method, hub + path, b"" if method != "GET" else None)
            is_sent_to_signin = answer.status == 303 and answer.headers["location"].startswith("/signin")
            assert answer.status == 401 or is_sent_to_signin, f"{method} {path} answered {answer.status} to nobody"


@pytest.mark.parametrize("path", ["/api/me", "/api/keys", "/api/generate", "/settings/keys", "/admin"])
@pytest.mark.parametrize("header", ["Bearer", "Bearer x", "Basic YTpi", "crlk_x", "", ":", "\u00e9:\u00e9"])
def test_t059_broken_credentials_are_never_taken_for_somebody(hub: str, path: str, header: str) -> None:
    answer = call("GET" if path.startswith(("/settings", "/admin")) else "POST", hub + path, headers={"Authorization": header})
    assert answer.status in (400, 401, 405) or (answer.status == 303 and answer.headers["location"].startswith("/signin"))
