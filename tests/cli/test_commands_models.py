"""list, ps, show and stop against a scripted server: what is asked, what is printed, and how it fails."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from corral.cli.app import run
from corral.cli.commands_models import processor_text, show_text
from fakes_cli import fake_server

MODEL = {
    "name": "smollm2:135m",
    "model": "smollm2:135m",
    "modified_at": (datetime.now(UTC) - timedelta(minutes=3, seconds=20)).isoformat(),
    "size": 98_362_432,
    "digest": "3f9a1c00aabb" + "0" * 52,
    "details": {},
}
STUB = {**MODEL, "name": "big:cloud", "remote_model": "big", "remote_host": "https://ollama.com:443", "size": 300}


def env(host: str) -> dict[str, str]:
    return {"HOME": "/nonexistent", "OLLAMA_HOST": host}


def test_list_prints_ollamas_table(capsys: pytest.CaptureFixture[str]) -> None:
    # Not the age that they have since this module was read, which in a long run is minutes ago.
    modified = {"modified_at": (datetime.now(UTC) - timedelta(minutes=3, seconds=20)).isoformat()}
    with fake_server({"GET /api/tags": (200, {"models": [MODEL | modified, STUB | modified]})}) as server:
        assert run(["list"], env(server.host)) == 0
    assert capsys.readouterr().out == (
        "NAME            ID              SIZE     MODIFIED      \n"
        "smollm2:135m    3f9a1c00aabb    98 MB    3 minutes ago    \n"
        "big:cloud       3f9a1c00aabb    -        3 minutes ago    \n"
    )


def test_list_of_a_prefix_ignores_case(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"GET /api/tags": (200, {"models": [MODEL, STUB]})}) as server:
        assert run(["ls", "SMOL"], env(server.host)) == 0
    out = capsys.readouterr().out
    assert "smollm2" in out
    assert "big" not in out


def test_list_without_models_prints_the_headings(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"GET /api/tags": (200, {"models": []})}) as server:
        assert run(["list"], env(server.host)) == 0
    assert capsys.readouterr().out.split() == ["NAME", "ID", "SIZE", "MODIFIED"]


def test_list_as_json_is_the_apis_array(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"GET /api/tags": (200, {"models": [MODEL]})}) as server:
        assert run(["list", "--json"], env(server.host)) == 0
    assert json.loads(capsys.readouterr().out) == [MODEL]


def test_list_without_a_server_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({}) as server:
        host = server.host
    assert run(["list"], env(host)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: could not connect to corral server, run 'corral serve' to start it\n→ ")
    assert host in err


def test_list_from_something_that_is_no_ollama_server_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"GET /api/tags": (200, [b"<html>hello</html>"])}) as server:
        assert run(["list"], env(server.host)) == 1
    assert "does not answer like an Ollama server" in capsys.readouterr().err


def test_ps_prints_processor_context_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    expires = datetime.now(UTC) + timedelta(minutes=4, seconds=30)
    running = {**MODEL, "expires_at": expires.isoformat(), "size_vram": 0, "context_length": 4096}
    stopping = {**running, "name": "old:1b", "expires_at": (expires - timedelta(hours=1)).isoformat(), "size_vram": MODEL["size"]}
    with fake_server({"GET /api/ps": (200, {"models": [running, stopping]})}) as server:
        assert run(["ps"], env(server.host)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert re.split(r"\s{2,}", lines[1].strip()) == [
        "smollm2:135m",
        "3f9a1c00aabb",
        "98 MB",
        "100% CPU",
        "4096",
        "4 minutes from now",
    ]
    assert "100% GPU" in lines[2]
    assert "Stopping..." in lines[2]


@pytest.mark.parametrize(
    ("size", "vram", "text"),
    [(100, 0, "100% CPU"), (100, 100, "100% GPU"), (100, 75, "25%/75% CPU/GPU"), (100, 200, "Unknown"), (0, 5, "Unknown")],
)
def test_processor_tells_where_the_memory_is(size: int, vram: int, text: str) -> None:
    assert processor_text(size, vram) == text


def test_stop_unloads_at_once() -> None:
    with fake_server({"POST /api/generate": (200, {"done": True, "done_reason": "unload"})}) as server:
        assert run(["stop", "smollm2:135m"], env(server.host)) == 0
    assert server.seen[0].body == {"model": "smollm2:135m", "keep_alive": 0, "stream": False}


def test_stop_of_an_unknown_model_uses_ollamas_words(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/generate": (404, {"error": "model 'x' not found"})}) as server:
        assert run(["stop", "x"], env(server.host)) == 1
    assert 'couldn\'t find model "x" to stop' in capsys.readouterr().err


DETAILS: dict[str, Any] = {
    "details": {"family": "llama", "quantization_level": "Q4_1"},
    "model_info": {
        "general.architecture": "llama",
        "general.parameter_count": 134515008,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "tokenizer.ggml.tokens": ["a", "b", "c", "d", "e"],
    },
    "capabilities": ["completion", "tools"],
    "parameters": 'stop                           "<|im_end|>"\ntemperature                    0.2',
    "system": "Be brief.",
    "license": "Apache License\n\nVersion 2.0\nMore\n",
    "template": "{{ .Prompt }}",
}


def test_show_prints_sections_with_indented_rows() -> None:
    text = show_text(DETAILS, verbose=False)
    assert text.startswith(
        "  Model\n"
        "    architecture        llama      \n"
        "    parameters          134.52M    \n"
        "    context length      8192       \n"
        "    embedding length    576        \n"
        "    quantization        Q4_1       \n"
        "\n"
        "  Capabilities\n"
        "    completion    \n"
        "    tools         \n"
        "\n"
    )
    assert '    stop           "<|im_end|>"    \n' in text
    assert text.endswith("  License\n    Apache License    \n    Version 2.0       \n    ...               \n\n")
    assert "Metadata" not in text


def test_show_verbose_abbreviates_arrays() -> None:
    assert "tokenizer.ggml.tokens      [a b c ...+2 more]" in show_text(DETAILS, verbose=True)


def test_show_of_one_part_prints_it_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/show": (200, DETAILS)}) as server:
        assert run(["show", "m", "--template"], env(server.host)) == 0
    assert capsys.readouterr().out == "{{ .Prompt }}"


def test_t114_show_of_one_part_on_a_terminal_holds_no_command_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_server({"POST /api/show": (200, {**DETAILS, "license": "\x1b]0;pwned\x07MIT\x9b2J\n\tok"})}) as server:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert run(["show", "m", "--license"], env(server.host)) == 0
    assert capsys.readouterr().out == "]0;pwnedMIT2J\n\tok\n"


def test_show_of_two_parts_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "m", "--template", "--system"], env("127.0.0.1:9")) == 2
    assert "only one of '--license', '--modelfile', '--parameters', '--system', or '--template'" in capsys.readouterr().err


def test_show_of_an_unknown_model_repeats_the_servers_words(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/show": (404, {"error": "model 'nope:latest' not found"})}) as server:
        assert run(["show", "nope"], env(server.host)) == 1
    assert capsys.readouterr().err == "Error: model 'nope:latest' not found\n"


def test_api_key_travels_to_loopback_and_not_over_plain_http_elsewhere() -> None:
    with fake_server({"GET /api/tags": (200, {"models": []})}) as server:
        run(["list"], {**env(server.host), "OLLAMA_API_KEY": "crlk_x"})
    assert server.seen[0].headers["authorization"] == "Bearer crlk_x"


def test_page_of_another_server_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"GET /api/tags": (404, [b"<html>somebody else</html>"])}) as server:
        assert run(["list"], env(server.host)) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {server.host} does not answer like an Ollama server\n→ check OLLAMA_HOST; ")
    assert "<html>" not in err
