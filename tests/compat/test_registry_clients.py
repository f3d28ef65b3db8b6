"""The unmodified `oras` package against the hub's registry: an artifact in and out, by its two ways of sending."""

from typing import Any

import pytest

from compat.conftest import Clients
from flows.stack import Stack


@pytest.fixture(scope="module")
def oras(clients: Clients, servers: Stack, key: str) -> dict[str, Any]:
    """What the package saw."""
    return clients["oras"].report(servers.hub_url, "alice/artifact", key)


@pytest.mark.parametrize("way", ["push", "push_chunked"])
def test_oras_pushes_an_artifact(oras: dict[str, Any], way: str) -> None:
    assert oras[way] == 201


@pytest.mark.parametrize("way", ["pull", "pull_chunked"])
def test_oras_pulls_what_was_pushed(oras: dict[str, Any], way: str) -> None:
    assert oras[way] == {"weights.bin": oras["sent"]}


def test_oras_lists_and_deletes_tags(oras: dict[str, Any]) -> None:
    assert sorted(oras["tags"]) == ["chunked", "whole"]
    assert oras["delete"] == ["chunked"]


def test_oras_without_an_account_finds_nothing_private(oras: dict[str, Any]) -> None:
    assert oras["stranger"] != "pulled"
    assert "weights" not in oras["stranger"]
