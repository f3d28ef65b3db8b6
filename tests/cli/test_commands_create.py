"""create, cp and rm against a scripted server: which files are sent under which names, what is asked, and how it fails."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from corral.cli.app import run
from fakes_cli import FakeServer, fake_server

GGUF = b"GGUF weights"
DONE = (200, [{"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"}])


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def answers(*here: bytes, missing: tuple[bytes, ...] = ()) -> dict[str, tuple[int, Any]]:
    """A server that has some blobs, lacks others, and makes what it is asked for."""
    rows: dict[str, tuple[int, Any]] = {"POST /api/create": DONE}
    for content in here:
        rows[f"HEAD /api/blobs/{digest_of(content)}"] = (200, [b""])
    for content in missing:
        rows[f"HEAD /api/blobs/{digest_of(content)}"] = (404, [b""])
        rows[f"POST /api/blobs/{digest_of(content)}"] = (201, [b""])
    return rows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(server: FakeServer, *arguments: str) -> int:
    return run(list(arguments), {"HOME": str(Path.cwd()), "OLLAMA_HOST": server.host})


def requested(server: FakeServer) -> dict[str, Any]:
    """The body of the one request to make a model."""
    (body,) = [seen.body for seen in server.seen if seen.path == "/api/create"]
    assert isinstance(body, dict)
    return body


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """What a command says that fails before it asks to make anything."""
    with fake_server(answers(GGUF)) as server:
        assert command(server, *arguments) == status
        assert not [seen for seen in server.seen if seen.path == "/api/create"]
    return capsys.readouterr().err


# ── create ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_create_sends_the_file_and_what_the_modelfile_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "m").mkdir()
    (folder / "m" / "tiny.gguf").write_bytes(GGUF)
    (folder / "m" / "Modelfile").write_text(
        'FROM ./tiny.gguf\nSYSTEM """Be\nbrief."""\nPARAMETER stop a\nPARAMETER mirostat 1\nLICENSE MIT\nMESSAGE user hi\n'
    )
    with fake_server(answers(missing=(GGUF,))) as server:
        assert command(server, "create", "mine", "-f", "m/Modelfile", "-q", "Q4_K_M") == 0
    assert requested(server) == {
        "model": "mine",
        "files": {"tiny.gguf": digest_of(GGUF)},
        "system": "Be\nbrief.",
        "parameters": {"stop": ["a"]},
        "license": ["MIT"],
        "messages": [{"role": "user", "content": "hi"}],
        "quantize": "Q4_K_M",
    }
    (sent,) = [seen for seen in server.seen if seen.method == "POST" and "blobs" in seen.path]
    assert (sent.path, sent.body) == (f"/api/blobs/{digest_of(GGUF)}", GGUF)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warning: parameter mirostat is deprecated" in captured.err
    assert captured.err.endswith("parsing GGUF\nwriting manifest\nsuccess\n")


def test_create_does_not_send_what_the_server_has(folder: Path) -> None:
    (folder / "tiny.gguf").write_bytes(GGUF)
    (folder / "Modelfile").write_text("FROM tiny.gguf")
    with fake_server(answers(GGUF)) as server:
        assert command(server, "create", "mine") == 0
    assert [(seen.method, seen.path) for seen in server.seen] == [
        ("HEAD", "/"),
        ("HEAD", f"/api/blobs/{digest_of(GGUF)}"),
        ("POST", "/api/create"),
    ]


def test_create_of_a_model_names_it(folder: Path) -> None:
    (folder / "Modelfile").write_text("FROM gpt-oss:20b-cloud\nSYSTEM x")
    with fake_server(answers()) as server:
        assert command(server, "create", "mine") == 0
    assert requested(server) == {"model": "mine", "from": "gpt-oss:20b-cloud", "system": "x"}


def test_create_sends_adapters_and_drafts_apart(folder: Path) -> None:
    for name in ("lora.gguf", "small.gguf"):
        (folder / name).write_bytes(name.encode())
    (folder / "Modelfile").write_text("FROM base\nADAPTER lora.gguf\nDRAFT ./small.gguf")
    with fake_server(answers(b"lora.gguf", b"small.gguf")) as server:
        assert command(server, "create", "mine", "--draft-quantize", "Q8_0") == 0
    body = requested(server)
    assert body["adapters"] == {"lora.gguf": digest_of(b"lora.gguf")}
    assert body["draft_files"] == {"small.gguf": digest_of(b"small.gguf")}
    assert (body["from"], body["draft_quantize"]) == ("base", "Q8_0")


def test_create_takes_the_gguf_files_of_a_directory(folder: Path) -> None:
    (folder / "model").mkdir()
    for name in ("b.gguf", "a.gguf", "README.md", "config.json"):
        (folder / "model" / name).write_bytes(name.encode())
    (folder / "Modelfile").write_text("FROM ./model")
    with fake_server(answers(b"a.gguf", b"b.gguf")) as server:
        assert command(server, "create", "mine") == 0
    assert list(requested(server)["files"]) == ["a.gguf", "b.gguf"]


def test_create_takes_safetensors_and_what_belongs_to_them(folder: Path) -> None:
    names = ["model-1.safetensors", "sub/model.safetensors", "config.json", "sub/modules.json", "tokenizer.model", "extra.gguf"]
    for name in [*names, "notes.txt"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    with fake_server(answers(*(name.encode() for name in names))) as server:
        assert command(server, "create", "mine") == 0
    assert sorted(requested(server)["files"]) == sorted(names[:-1])


def test_create_tells_files_of_one_name_apart(folder: Path) -> None:
    for name in ("a/m.gguf", "b/m.gguf"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(name.encode())
    (folder / "Modelfile").write_text("FROM a/m.gguf\nFROM b/m.gguf")
    with fake_server(answers(b"a/m.gguf", b"b/m.gguf")) as server:
        assert command(server, "create", "mine") == 0
    assert requested(server)["files"] == {name: digest_of(name.encode()) for name in ("a/m.gguf", "b/m.gguf")}


def test_create_reads_a_modelfile_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"FROM base")))
    with fake_server(answers()) as server:
        assert command(server, "create", "mine", "-f", "-") == 0
    assert requested(server)["from"] == "base"


def test_create_expands_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "tiny.gguf").write_bytes(GGUF)
    (folder / "m").mkdir()
    (folder / "m" / "Modelfile").write_text("FROM ~/tiny.gguf")
    with fake_server(answers(GGUF)) as server:
        assert command(server, "create", "mine", "-f", "m/Modelfile") == 0


@pytest.mark.parametrize(
    ("arguments", "modelfile", "message"),
    [
        (["a//b"], "FROM x", "Error: invalid model name: a//b"),
        (["mine", "-f", "nope"], "FROM x", "Error: specified Modelfile wasn't found"),
        (["mine"], "", "Error: Modelfile: no FROM line"),
        (["mine"], "FROM a\nFOO b", "Error: Modelfile (line 2): command must be one of"),
        (["mine"], "FROM ./nope.gguf", "Error: Modelfile (line 1): there is no file ./nope.gguf"),
        (["mine"], "FROM nope.gguf", "Error: Modelfile (line 1): there is no file nope.gguf"),
        (["mine"], "FROM x\nADAPTER nope", "Error: Modelfile (line 2): there is no file nope"),
        (
            ["mine"],
            "FROM Modelfile\nDRAFT ./Modelfile",
            "Error: Modelfile (line 2): DRAFT must not reference the same local path as FROM",
        ),
        (["mine"], "FROM x\nPARAMETER nope 1", "Error: Modelfile (line 2): unknown parameter 'nope'"),
        (["mine"], "FROM .", "Error: no Modelfile or safetensors files found"),
    ],
)
def test_create_that_cannot_begin_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], modelfile: str, message: str
) -> None:
    (folder / "Modelfile").write_text(modelfile)
    assert refused(capsys, "create", *arguments).removeprefix("gathering model components\n").startswith(message)


def test_create_without_any_modelfile_looks_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "create", "mine").endswith(
        "Error: no Modelfile or safetensors files found\n→ looked in .; -f names a Modelfile that is elsewhere\n"
    )


def test_create_quantizes_a_draft_only_where_there_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "Modelfile").write_text("FROM x")
    err = refused(capsys, "create", "mine", "--draft-quantize", "Q8_0", status=2)
    assert err.startswith("Error: --draft-quantize requires a DRAFT model")


def test_t108_create_sends_nothing_from_outside_a_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "secret").write_bytes(b"secret")
    (folder / "model").mkdir()
    (folder / "model" / "a.gguf").symlink_to(folder / "secret")
    (folder / "Modelfile").write_text("FROM ./model")
    assert "insecure path" in refused(capsys, "create", "mine")


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_t108_create_reads_regular_files_only(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(folder / "a.gguf")
    (folder / "Modelfile").write_text("FROM a.gguf" if kind == "fifo" else "FROM /dev/zero")
    assert "is not a regular file" in refused(capsys, "create", "mine")


def test_t109_create_takes_no_pickle_out_of_a_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "may hold a program" in refused(capsys, "create", "mine")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "unknown type"}), "Error: 400 Bad Request: unknown type"),
        ((200, [{"status": "parsing GGUF"}, {"error": "supplied file was not in GGUF format"}]), "supplied file was not"),
        ((200, [{"status": "parsing GGUF"}]), "Error: the server stopped before the model was made"),
    ],
)
def test_create_that_the_server_refuses_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], answer: tuple[int, Any], message: str
) -> None:
    (folder / "Modelfile").write_text("FROM base")
    with fake_server({"POST /api/create": answer}) as server:
        assert command(server, "create", "mine") == 1
    assert message in capsys.readouterr().err


def test_create_tells_what_a_server_says_that_refuses_a_blob(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tiny.gguf").write_bytes(GGUF)
    (folder / "Modelfile").write_text("FROM tiny.gguf")
    rows = answers(missing=(GGUF,))
    rows[f"POST /api/blobs/{digest_of(GGUF)}"] = (507, {"error": "no space left for the model store"})
    with fake_server(rows) as server:
        assert command(server, "create", "mine") == 1
    assert "Error: no space left for the model store" in capsys.readouterr().err


# ── cp and rm ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cp_says_what_it_copied(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/copy": (200, [b""])}) as server:
        assert command(server, "cp", "a", "b") == 0
    assert [seen.body for seen in server.seen] == [{"source": "a", "destination": "b"}]
    assert capsys.readouterr().out == "copied 'a' to 'b'\n"


def test_rm_unloads_what_runs_and_removes_each(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "GET /api/ps": (200, {"models": [{"name": "A:latest"}]}),
        "POST /api/generate": (200, {"done": True}),
        "DELETE /api/delete": (200, [b""]),
    }
    with fake_server(rows) as server:
        assert command(server, "rm", "a", "b:1b") == 0
    assert [(seen.method, seen.path) for seen in server.seen] == [
        ("GET", "/api/ps"),
        ("POST", "/api/generate"),
        ("DELETE", "/api/delete"),
        ("GET", "/api/ps"),
        ("DELETE", "/api/delete"),
    ]
    assert server.seen[1].body == {"model": "a", "keep_alive": 0, "stream": False}
    assert server.seen[2].body == {"model": "a", "name": "a"}
    assert capsys.readouterr().out == "deleted 'a'\ndeleted 'b:1b'\n"


def test_rm_removes_what_could_not_be_unloaded(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"GET /api/ps": (200, {"models": [{"name": "a:latest"}]}), "DELETE /api/delete": (200, [b""])}
    with fake_server(rows) as server:
        assert command(server, "rm", "a") == 0
    captured = capsys.readouterr()
    assert captured.err == "Warning: unable to stop model 'a'\n"
    assert captured.out == "deleted 'a'\n"


def test_rm_stops_at_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"DELETE /api/delete": (404, {"error": "model 'a b' not found"})}) as server:
        assert command(server, "rm", "a b", "c") == 1
    assert len([seen for seen in server.seen if seen.method == "DELETE"]) == 1
    assert capsys.readouterr().err == "Error: model 'a b' not found\n"


def test_rm_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rm"], {}) == 2
