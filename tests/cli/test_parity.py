"""What our command says beside what Ollama's says, case by case: (command line, the server's answers, stdout, stderr, status).

The texts were taken from the real `ollama` (commit fb30760) against our server; where ours differ on purpose, docs/divergences.md
says why: an arrow with what to do follows an error, wrong usage is status 2 instead of 1, and nothing redraws itself in a pipe.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from corral.cli.app import run
from fakes_cli import fake_server

DIGEST = "3f9a1c00aabb" + "0" * 52
OLD = "2001-01-01T00:00:00Z"
TINY = {"name": "tiny:latest", "model": "tiny:latest", "modified_at": OLD, "size": 1_500, "digest": DIGEST, "details": {}}
STUB = {**TINY, "name": "Big:cloud", "remote_model": "big", "remote_host": "https://ollama.com:443"}
RUNNING = {**TINY, "expires_at": "2318-01-01T00:00:00Z", "size_vram": 750, "context_length": 4096}
STOPPING = {**TINY, "name": "old:1b", "expires_at": OLD, "size_vram": 1_500, "context_length": 512, "size": 1_500}
SHOWN = {
    "details": {"parameter_size": "134.52M", "quantization_level": "Q4_1"},
    "model_info": {
        "general.architecture": "llama",
        "general.parameter_count": 1500,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["Ġ t", "Ġ a", "i n"],
        "tokenizer.ggml.tokens": ["<|endoftext|>", "b"],
        "tokenizer.ggml.types": [3, 3, 3, 1, 1],
        "tokenizer.none": None,
    },
    "projector_info": {"general.architecture": "clip", "clip.audio.embedding_length": 512, "general.parameter_count": 1_500_000},
    "tensors": [{"name": "output.weight", "type": "F32", "shape": [576, 2]}, {"name": "b", "type": "Q4_1", "shape": [1]}],
    "capabilities": ["completion", "audio"],
    "parameters": 'stop                           "<|im_end|>"\ntemperature                    0.2',
    "system": "Be brief.\n\n Always. \nReally.",
    "license": "MIT",
    "template": "{{ .Prompt }}",
    "modelfile": "FROM x\n",
}
NOT_FOUND = (404, {"error": "model 'x:latest' not found"})
PULLED = [
    {"status": "pulling manifest"},
    {"status": "pulling 3f9a1c00aabb", "digest": f"sha256:{DIGEST}", "total": 1_500, "completed": 0},
    {"status": "pulling 3f9a1c00aabb", "digest": f"sha256:{DIGEST}", "total": 1_500, "completed": 1_500},
    {"status": "verifying sha256 digest"},
    {"status": "writing manifest"},
    {"status": "success"},
]


@dataclass(frozen=True)
class Case:
    line: str
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    out: str = ""
    err: str = ""
    status: int = 0


def usage(line: str, text: str, advice: str) -> Case:
    return Case(line, err=f"Error: {text}\n→ {advice}\n", status=2)


CASES = [
    # ── Arguments and flags (cobra) ──
    usage("show", "accepts 1 arg(s), received 0", "corral show --help"),
    usage("show a b", "accepts 1 arg(s), received 2", "corral show --help"),
    usage("stop", "accepts 1 arg(s), received 0", "corral stop --help"),
    usage("cp", "accepts 2 arg(s), received 0", "corral cp --help"),
    usage("cp a", "accepts 2 arg(s), received 1", "corral cp --help"),
    usage("cp a b c", "accepts 2 arg(s), received 3", "corral cp --help"),
    usage("rm", "requires at least 1 arg(s), only received 0", "corral rm --help"),
    usage("run", "requires at least 1 arg(s), only received 0", "corral run --help"),
    usage("create", "accepts 1 arg(s), received 0", "corral create --help"),
    usage("pull a b", "accepts 1 arg(s), received 2", "corral pull --help"),
    usage("push", "accepts 1 arg(s), received 0", "corral push --help"),
    usage("list a b", "accepts at most 1 arg(s), received 2", "corral list --help"),
    usage("ls a b", "accepts at most 1 arg(s), received 2", "corral ls --help"),
    usage("signin x", "accepts 0 arg(s), received 1", "corral signin --help"),
    usage("logout x", "accepts 0 arg(s), received 1", "corral logout --help"),
    usage("start x", "accepts 0 arg(s), received 1", "corral start --help"),
    usage("serve --nope", "unknown flag: --nope", "corral serve --help"),
    usage("show m -x", "unknown shorthand flag: 'x' in -x", "corral show --help"),
    usage("show m --licence", "unknown flag: --licence", "did you mean --license?"),
    usage("create m -f", "flag needs an argument: 'f' in -f", "corral create --help"),
    usage("create m --file", "flag needs an argument: --file", "corral create --help"),
    usage(
        "pull m --insecure=maybe",
        'invalid argument "maybe" for "--insecure" flag: strconv.ParseBool: parsing "maybe": invalid syntax',
        "corral pull --help",
    ),
    usage("nope", 'unknown command "nope" for "corral"', "corral --help"),
    usage("version", 'unknown command "version" for "corral"', "corral --version"),
    usage("lis", 'unknown command "lis" for "corral"', "did you mean corral list?"),
    usage("hub use", 'unknown command "use" for "corral hub"', "did you mean corral hub user?"),
    usage("hub user add", "accepts 1 arg(s), received 0", "corral hub user add --help"),
    usage("hub device add alice", 'required flag(s) "name" not set', "corral hub device add --help"),
    usage("hub quota alice 10", "10 would be 10 bytes", "give a unit: 10GB, or 10B for so few bytes"),
    usage("hub quota alice lots", "'lots' is no size", "give a size such as 500MB, 20GB or 1.5TB, or none"),
    usage("doctor keys", "Invalid value for '[auth]': 'keys' is not 'auth'.", "corral doctor --help"),
    usage("doctor auth keys", "accepts at most 1 arg(s), received 2", "corral doctor --help"),
    usage("hub user list --jsn", "unknown flag: --jsn", "did you mean --json?"),
    usage("keys create ci --scope pusch", 'there is no scope "pusch"', "scopes are inference, models:pull, models:push, keys"),
    usage(
        "hub key create alice --name ci --scope x",
        'there is no scope "x"',
        "scopes are inference, models:pull, models:push, keys",
    ),
    Case(
        "show m --license --system",
        err="Error: only one of '--license', '--modelfile', '--parameters', '--system', or '--template' can be specified\n",
        status=2,
    ),
    # ── list, ps ──
    Case("list", {"GET /api/tags": (200, {"models": []})}, "NAME    ID    SIZE    MODIFIED \n"),
    Case(
        "list",
        {"GET /api/tags": (200, {"models": [TINY, STUB]})},
        "NAME           ID              SIZE      MODIFIED     \n"
        "tiny:latest    3f9a1c00aabb    1.5 KB    25 years ago    \n"
        "Big:cloud      3f9a1c00aabb    -         25 years ago    \n",
    ),
    Case(
        "ls BIG",
        {"GET /api/tags": (200, {"models": [TINY, STUB]})},
        "NAME         ID              SIZE    MODIFIED     \nBig:cloud    3f9a1c00aabb    -       25 years ago    \n",
    ),
    Case("ps", {"GET /api/ps": (200, {"models": []})}, "NAME    ID    SIZE    PROCESSOR    CONTEXT    UNTIL \n"),
    Case(
        "ps",
        {"GET /api/ps": (200, {"models": [RUNNING, STOPPING]})},
        "NAME           ID              SIZE      PROCESSOR          CONTEXT    UNTIL       \n"
        "tiny:latest    3f9a1c00aabb    1.5 KB    50%/50% CPU/GPU    4096       Forever        \n"
        "old:1b         3f9a1c00aabb    1.5 KB    100% GPU           512        Stopping...    \n",
    ),
    Case("ps TINY", {"GET /api/ps": (200, {"models": [RUNNING]})}, "NAME    ID    SIZE    PROCESSOR    CONTEXT    UNTIL \n"),
    # ── show ──
    Case("show x", {"POST /api/show": NOT_FOUND}, err="Error: model 'x:latest' not found\n", status=1),
    Case("show x --license", {"POST /api/show": (200, SHOWN)}, "MIT\n"),
    Case("show x --license=true", {"POST /api/show": (200, SHOWN)}, "MIT\n"),
    Case("show x --modelfile", {"POST /api/show": (200, SHOWN)}, "FROM x\n\n"),
    Case("show x --parameters", {"POST /api/show": (200, SHOWN)}, f"{SHOWN['parameters']}\n"),
    Case("show x --system", {"POST /api/show": (200, SHOWN)}, "Be brief.\n\n Always. \nReally."),
    Case("show x --template --system=false", {"POST /api/show": (200, SHOWN)}, "{{ .Prompt }}"),
    Case("show x --license", {"POST /api/show": (200, {"model_info": {}})}, "\n"),
    Case(
        "show x",
        {"POST /api/show": (200, {"capabilities": ["image"], "model_info": {}})},
        err="Error: image generation models are not currently supported\n",
        status=1,
    ),
    Case(
        "show x",
        {"POST /api/show": (200, SHOWN)},
        "  Model\n"
        "    architecture        llama      \n"
        "    parameters          134.52M    \n"
        "    context length      8192       \n"
        "    embedding length    576        \n"
        "    quantization        Q4_1       \n"
        "\n"
        "  Capabilities\n"
        "    completion    \n"
        "    audio         \n"
        "\n"
        "  Projector\n"
        "    architecture        clip     \n"
        "    parameters          1.50M    \n"
        "    embedding length    512      \n"
        "\n"
        "  Parameters\n"
        '    stop           "<|im_end|>"    \n'
        "    temperature    0.2             \n"
        "\n"
        "  System\n"
        "    Be brief.    \n"
        "    Always.      \n"
        "    ...          \n"
        "\n"
        "  License\n"
        "    MIT    \n"
        "\n",
    ),
    Case(
        "show x -v",
        {"POST /api/show": (200, {**SHOWN, "system": "", "license": "", "parameters": "", "projector_info": None})},
        "  Model\n"
        "    architecture        llama      \n"
        "    parameters          134.52M    \n"
        "    context length      8192       \n"
        "    embedding length    576        \n"
        "    quantization        Q4_1       \n"
        "\n"
        "  Capabilities\n"
        "    completion    \n"
        "    audio         \n"
        "\n"
        "  Metadata\n"
        "    general.architecture            llama                         \n"
        "    general.parameter_count         1500                          \n"
        "    llama.context_length            8192                          \n"
        "    llama.embedding_length          576                           \n"
        "    tokenizer.ggml.add_bos_token    false                         \n"
        "    tokenizer.ggml.merges           [Ġ t Ġ a ...+1 more]          \n"
        "    tokenizer.ggml.tokens           [<|endoftext|> ...+1 more]    \n"
        "    tokenizer.ggml.types            [3 3 3 ...+2 more]            \n"
        "    tokenizer.none                  <nil>                         \n"
        "\n"
        "  Tensors\n"
        "    output.weight    F32     [576 2]    \n"
        "    b                Q4_1    [1]        \n"
        "\n",
    ),
    # ── stop, cp, rm ──
    Case("stop x", {"POST /api/show": (200, SHOWN), "POST /api/generate": (200, {"done": True})}),
    Case(
        "stop x",
        {"POST /api/show": NOT_FOUND, "POST /api/generate": NOT_FOUND},
        err='Error: couldn\'t find model "x" to stop\n→ corral ps lists the running ones\n',
        status=1,
    ),
    Case(
        "stop a//b",
        {path: (400, {"error": "invalid model name"}) for path in ("POST /api/show", "POST /api/generate")},
        err="Error: invalid model name\n",
        status=1,
    ),
    Case("cp a b", {"POST /api/copy": (200, None)}, "copied 'a' to 'b'\n"),
    Case("cp a b", {"POST /api/copy": (404, {"error": 'model "a" not found'})}, err='Error: model "a" not found\n', status=1),
    Case(
        "rm a b",
        {"GET /api/ps": (200, {"models": []}), "DELETE /api/delete": (200, None)},
        "deleted 'a'\ndeleted 'b'\n",
    ),
    Case(
        "rm a",
        {
            "GET /api/ps": (200, {"models": [{"name": "a:latest"}]}),
            "POST /api/show": (200, SHOWN),
            "POST /api/generate": (500, {"error": "no"}),
            "DELETE /api/delete": (200, None),
        },
        "deleted 'a'\n",
        "Warning: unable to stop model 'a'\n",
    ),
    Case(
        "rm a",
        {"GET /api/ps": (200, {"models": []}), "DELETE /api/delete": (404, {"error": "model 'a' not found"})},
        err="Error: model 'a' not found\n",
        status=1,
    ),
    # ── pull, push, create ──
    Case(
        "pull x",
        {"POST /api/pull": (200, PULLED)},
        err="pulling manifest\npulling 3f9a1c00aabb: 1.5 KB\nverifying sha256 digest\nwriting manifest\nsuccess\n",
    ),
    Case(
        "pull a//b",
        {"POST /api/pull": (400, {"error": "invalid model name"})},
        err="Error: 400 Bad Request: invalid model name\n",
        status=1,
    ),
    Case(
        "push x",
        {
            "POST /api/me": (200, {"name": "alice"}),
            "POST /api/push": (200, [{"status": "retrieving manifest"}, {"error": "unauthorized: access denied"}]),
        },
        err="retrieving manifest\n"
        "Error: you are not authorized to push to this namespace, create the model under a namespace you own\n"
        "→ corral whoami says who you are here, corral signin changes it\n",
        status=1,
    ),
    Case(
        "push x --private --public",
        err="Error: only one of '--private' or '--public' can be specified\n→ corral push --help\n",
        status=2,
    ),
    Case(
        "create a//b",
        err="Error: invalid model name: a//b\n→ names look like tiny, alice/tiny:1b or hub.example:5000/alice/tiny\n",
        status=1,
    ),
    Case("create m -f nofile", err="Error: specified Modelfile wasn't found\n→ there is no file nofile\n", status=1),
    Case("create m --draft-quantize Q4_0", err="Error: --draft-quantize requires a DRAFT model\n", status=2),
    Case(
        "create m",
        {"POST /api/create": (200, [{"status": "writing manifest"}, {"status": "success"}])},
        err="gathering model components\nwriting manifest\nsuccess\n",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.line)
def test_command_says_what_ollamas_says(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text("FROM tiny\n")
    monkeypatch.chdir(tmp_path)
    with fake_server(case.answers) as server:
        status = run(case.line.split(), {"HOME": "/nonexistent", "OLLAMA_HOST": server.host})
    captured = capsys.readouterr()
    assert (captured.out, captured.err, status) == (re.sub("25(?= years)", str(years()), case.out), case.err, case.status)


def years() -> int:
    """How long ago OLD is, in the years of 365 days that Ollama counts in."""
    from datetime import UTC, datetime

    return (datetime.now(UTC) - datetime.fromisoformat(OLD)).days // 365


@pytest.mark.parametrize("line", ["list", "ps", "show x", "stop x", "cp a b", "rm x", "pull x", "push x", "create x"])
def test_command_without_a_server_says_how_to_start_one(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with fake_server({}) as server:
        pass
    assert run(line.split(), {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}) == 1
    assert capsys.readouterr() == (
        "",
        "Error: could not connect to corral server, run 'corral serve' to start it\n"
        f"→ nothing listens on {server.url}; set OLLAMA_HOST if it is elsewhere\n",
    )


# ── Beside the real one ──────────────────────────────────────────────────────────────────────────────────────────────

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


#: What there is not in Ollama, and what it does otherwise (docs/divergences.md).
_OURS = ("hub", "keys", "doctor", "push x --", "list a b", "ls a b", "lis", "create m", "rm a b", "show m -")


@pytest.mark.parametrize("case", [case for case in CASES if not case.line.startswith(_OURS)], ids=lambda case: case.line)
def test_ollamas_own_command_says_so(case: Case, tmp_path: Path) -> None:
    """The table above, held against the program that it was taken from."""
    program = os.environ.get("CORRAL_TEST_OLLAMA", "")
    if not program:
        pytest.skip("CORRAL_TEST_OLLAMA names no ollama program")
    with fake_server({"HEAD /": (200, None), **case.answers}) as server:
        env = {"HOME": str(tmp_path), "OLLAMA_HOST": server.host, "PATH": os.environ["PATH"]}
        done = subprocess.run([program, *case.line.split()], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is (case.status != 0)
    assert done.stdout == re.sub("25(?= years)", str(years()), case.out)
    theirs = _ESCAPES.sub("", done.stderr).replace("ollama", "corral").splitlines()
    ours = [line for line in case.err.splitlines() if line.startswith(("Error: ", "Warning: "))]
    assert [line for line in theirs if line.startswith(("Error: ", "Warning: "))] == ours
