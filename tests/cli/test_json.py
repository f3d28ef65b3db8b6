"""`--json`: the commands that have it, and that what they print is what docs/reference.md says."""

import json
from datetime import UTC, datetime
from typing import Any

import click
import pytest

from corral.cli.app import root, run
from corral.cli.commands_hub import account_object, key_object
from corral.core.records import Account, ApiKey, Scope
from fakes_cli import fake_server
from tooling import tool_module

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def documented(command: str) -> set[str]:
    _, fields, _ = tool_module("make_reference").JSON_SHAPES[command]
    return {word.strip(" ;") for word in fields.replace(";", ",").split(",")}


def test_every_command_with_json_is_documented() -> None:
    def has_json(command: click.Command) -> bool:
        return any("--json" in option.opts for option in command.params)

    walked = tool_module("make_reference").walk(root, ())
    with_json = [path.removeprefix("corral ") for path, command in walked if has_json(command)]
    shapes = tool_module("make_reference").JSON_SHAPES
    assert sorted(with_json) == sorted(shapes), "→ a row in JSON_SHAPES of tools/make_reference.py"


@pytest.mark.parametrize(("line", "path", "answer"), [("list", "GET /api/tags", "models"), ("ps", "GET /api/ps", "models")])
def test_json_of_a_table_is_the_servers_array(line: str, path: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"name": "a:latest", "size": 12345678901, "new_field": [1]}, {"name": "b:latest", "size": 0}]
    for shown in (rows, []):
        with fake_server({path: (200, {answer: shown})}) as server:
            assert run([line, "--json"], {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}) == 0
        assert json.loads(capsys.readouterr().out) == shown


def test_json_of_one_model_is_all_that_the_server_tells(capsys: pytest.CaptureFixture[str]) -> None:
    details = {"model_info": {"a": [1, 2, 3, 4, 5]}, "license": "x", "capabilities": ["image"]}
    with fake_server({"POST /api/show": (200, details)}) as server:
        assert run(["show", "m", "--json"], {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}) == 0
    assert json.loads(capsys.readouterr().out) == details


def test_accounts_and_keys_have_the_documented_fields() -> None:
    account = Account(id="1", name="ada", email="", is_admin=True, created_at=NOW)
    assert set(account_object(account)) == documented("hub user list")
    key = ApiKey(id="1", account_id="1", name="ci", prefix="crlk_1", scopes=frozenset({Scope.KEYS}), created_at=NOW)
    assert set(key_object(key)) == documented("hub key list") == documented("keys list")
