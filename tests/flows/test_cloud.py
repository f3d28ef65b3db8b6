"""The cloud's part end to end: stubs, web search and fetch, what is kept; and beside a real `ollama`, byte for byte.

The comparison needs an `ollama` program (`CORRAL_TEST_OLLAMA`, or on the PATH): both servers get the same requests, and both talk
to one recorder that stands for the cloud.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.stack import MODEL, Answer, Stack, answers, call, corral_command, free_port, wait_until

CLOUD = f"{MODEL}-cloud"


# ── A server that stands for the web, and for the cloud ──────────────────────────────────────────────────────────────


class Recorder:
    """Answers every request as told and keeps what it got: (method, path, query without ts, body)."""

    def __init__(self) -> None:
        self.status, self.content_type, self.body = 200, "application/json", b"{}"
        self.got: list[tuple[str, str, str, bytes]] = []
        self.url = ""

    def will(self, body: bytes, *, status: int = 200, content_type: str = "application/json") -> None:
        self.status, self.content_type, self.body = status, content_type, body
        self.got.clear()


@contextmanager
def recorder() -> Iterator[Recorder]:
    kept = Recorder()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path, _, query = self.path.partition("?")
            is_ours = path.startswith("/.well-known/")
            if not is_ours:
                kept.got.append((self.command, path, re.sub(r"&?ts=[0-9]+", "", query), body))
            status, answer = (404, b"") if is_ours else (kept.status, kept.body)
            self.send_response(status)
            self.send_header("Content-Type", kept.content_type)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST  # noqa: N815 - the name that the base class looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as there
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        kept.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield kept
        finally:
            listening.shutdown()
            thread.join()


# ── Our own two halves ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def web() -> Iterator[Recorder]:
    with recorder() as kept:
        yield kept


@pytest.fixture(scope="module")
def signed_in(web: Recorder, tmp_path_factory: pytest.TempPathFactory, home_with_model: Path) -> Iterator[Stack]:
    """A started installation that may search and fetch on this machine, with its device connected."""
    environment = {"CORRAL_SEARCH_URL": web.url, "CORRAL_WEB_FETCH": "on", "CORRAL_WEB_FETCH_NETWORKS": "127.0.0.0/8"}
    with Stack(tmp_path_factory.mktemp("stack"), like=home_with_model, **environment) as stack:
        stack.start()
        stack.add_account("alice")
        stack.sign_in()
        yield stack


def test_installed_stub_runs_with_its_own_texts_and_says_where(signed_in: Stack) -> None:
    body = {"model": "brief", "from": CLOUD, "system": "Answer with one word.", "parameters": {"num_predict": 3}, "stream": False}
    assert call("POST", f"{signed_in.local_url}/api/create", body).json == {"status": "success"}
    asked = {"model": "brief", "messages": [{"role": "user", "content": "Hello"}]}
    lines = call("POST", f"{signed_in.local_url}/api/chat", asked).lines
    assert {(line["model"], line["remote_model"], line["remote_host"]) for line in lines} == {
        ("brief", MODEL, signed_in.hub_url.replace("localhost", lines[0]["remote_host"].split("/")[2].split(":")[0]))
    }
    assert lines[-1]["eval_count"] <= 3
    answer = call("POST", f"{signed_in.local_url}/v1/chat/completions", asked)
    assert (answer.status, answer.json["model"], answer.json["usage"]["completion_tokens"] <= 3) == (200, "brief", True)
    assert call("POST", f"{signed_in.local_url}/api/chat", {**asked, "model": "brief:local"}).status == 404


def test_search_and_fetch_go_by_the_hub_to_the_web(signed_in: Stack, web: Recorder) -> None:
    experimental = f"{signed_in.local_url}/api/experimental"
    web.will(json.dumps({"results": [{"title": "t", "url": "https://one.example/", "content": "c"}]}).encode())
    found = call("POST", f"{experimental}/web_search", {"query": "cats", "max_results": 1})
    assert found.json == {"results": [{"title": "t", "url": "https://one.example/", "content": "c"}]}
    assert web.got[0][:3] == ("GET", "/search", "q=cats&format=json")
    web.will(b"<title>T</title><p>hello <a href='/next'>on</a>", content_type="text/html")
    page = call("POST", f"{experimental}/web_fetch", {"url": f"{web.url}/page"})
    assert page.json == {"title": "T", "content": "hello on", "links": [f"{web.url}/next"]}
    assert call("POST", f"{experimental}/web_fetch", {"url": "http://169.254.169.254/latest"}).status == 502
    assert call("POST", f"{signed_in.hub_url}/api/web_search", {"query": "x"}).status == 401


def test_hub_recommends_what_it_hosts_and_the_local_server_passes_it_on(signed_in: Stack) -> None:
    (there,) = call("GET", f"{signed_in.hub_url}/api/experimental/model-recommendations").json["recommendations"]
    assert (there["model"], there["context_length"]) == (CLOUD, there["max_output_tokens"])
    (here,) = call("GET", f"{signed_in.local_url}/api/experimental/model-recommendations").json["recommendations"]
    assert here == there


def test_facts_of_a_cloud_model_are_the_same_when_they_are_kept(signed_in: Stack) -> None:
    first, second = (call("POST", f"{signed_in.local_url}/api/show", {"model": CLOUD}) for _ in range(2))
    assert (first.status, first.body) == (200, second.body)
    assert first.headers["content-type"] == second.headers["content-type"] == "application/json; charset=utf-8"


# ── Beside a real ollama ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def serving(command: list[str], home: Path, cloud: str, **environment: str) -> Iterator[str]:
    url, home = f"http://127.0.0.1:{free_port()}", home
    home.mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "OLLAMA_HOST": url, "OLLAMA_CLOUD_BASE_URL": cloud, **environment}
    env |= {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: answers(url), f"{command[0]} answers")
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Pair:
    """Corral's local server and a real one, at the same recorder."""

    def __init__(self, ours: str, theirs: str, cloud: Recorder) -> None:
        self.ours, self.theirs, self.cloud = ours, theirs, cloud

    def ask(self, method: str, target: str, body: Any, **answer: Any) -> tuple[list[Any], list[Any]]:
        """(what ours answered and sent, what theirs did). answer: of the cloud."""
        told = []
        for url in (self.ours, self.theirs):
            self.cloud.will(
                answer.get("said", b"{}"), status=answer.get("status", 200), content_type=answer.get("kind", "application/json")
            )
            got = call(method, f"{url}{target}", body)
            told.append([got, list(self.cloud.got)])
        return told[0], told[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    program = os.environ.get("CORRAL_TEST_OLLAMA") or shutil.which("ollama")
    if not program:
        pytest.skip("no ollama program: put it on the PATH or name it in CORRAL_TEST_OLLAMA")
    folder, remotes = tmp_path_factory.mktemp("pair"), {"OLLAMA_REMOTES": "127.0.0.1"}
    with (
        recorder() as cloud,
        serving([*corral_command(), "serve"], folder / "ours", cloud.url, **remotes) as ours,
        serving([program, "serve"], folder / "theirs", cloud.url, **remotes) as theirs,
    ):
        made = Pair(ours, theirs, cloud)
        stub = {
            "model": "mine", "from": "big:1t", "remote_host": cloud.url, "system": "Be brief.", "template": "{{ .Prompt }}!",
            "parameters": {"temperature": 0.5, "stop": ["END"], "num_ctx": 64},
            "messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}],
            "info": {"model_family": "qwen3", "context_length": 99, "capabilities": ["completion", "tools"]},
        }  # fmt: skip
        far = {"model": "far", "from": "big:1t", "remote_host": "box"}
        for wanted in (stub, far, {"model": "byname", "from": "big:1t-cloud"}):
            mine, real = made.ask("POST", "/api/create", {**wanted, "stream": False})
            assert mine[0].json == real[0].json == {"status": "success"}
        yield made


LINE = b'{"model":"big:1t","created_at":"2026-08-22T10:00:00.123456789Z",%s,"done":%s}\n'
CHAT = LINE % (b'"message":{"role":"assistant","content":"a"}', b"false") + (
    LINE % (b'"message":{"role":"assistant","content":""}', b'true,"done_reason":"stop","total_duration":5,"eval_count":2')
)
TEXT = LINE % (b'"response":"a"', b"false") + LINE % (b'"response":""', b'true,"done_reason":"stop","context":[1],"eval_count":2')
USER = {"role": "user", "content": "hi"}
THOUGHT = {"role": "assistant", "content": "<think>x</think> y"}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/chat", {"messages": [USER, THOUGHT, USER], "keep_alive": "90s", "think": True, "options": {"seed": 1}}, CHAT),
        ("/api/chat", {"messages": [{"role": "system", "content": "S"}, USER], "format": {"type": "object"}}, CHAT),
        ("/api/chat", {"messages": [USER], "think": "high", "logprobs": True, "top_logprobs": 2, "truncate": False}, CHAT),
        ("/api/generate", {"prompt": "p", "keep_alive": -1, "images": ["AAEC"], "context": [1]}, TEXT),
        ("/api/generate", {"prompt": "p", "system": "S", "template": "T", "suffix": "s", "options": {"temperature": 0}}, TEXT),
        ("/api/chat", {"messages": [USER]}, CHAT.splitlines(keepends=True)[0]),
    ],
)  # fmt: skip
def test_stub_sends_and_answers_what_ollamas_does(path: str, body: dict[str, Any], said: bytes, pair: Pair) -> None:
    for asked in (body, {**body, "stream": False}):
        content = said if "stream" not in asked else said.splitlines(keepends=True)[-1]
        mine, real = pair.ask("POST", path, {"model": "Mine", **asked}, said=content, kind="application/x-ndjson")
        assert mine[1] == real[1]
        assert_same(mine[0], real[0])


def assert_same(mine: Answer, real: Answer) -> None:
    """The same answer; a single object of ours has no line end behind it."""
    assert (mine.status, mine.headers["content-type"]) == (real.status, real.headers["content-type"])
    assert mine.body.rstrip(b"\n") == real.body.rstrip(b"\n")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, b'{"error":"slow down"}'),
        (500, b"boom"),
        (404, b'{"error":"no such model"}'),
        (200, b'{"error":"broken"}\n'),
        (200, b"nonsense\n"),
    ],
)
def test_refusal_of_a_stubs_server_is_told_as_ollama_tells_it(status: int, said: bytes, pair: Pair) -> None:
    mine, real = pair.ask("POST", "/api/generate", {"model": "mine", "prompt": "p"}, said=said, status=status)
    assert (mine[0].status, mine[0].body) == (real[0].status, real[0].body)


def test_error_in_the_middle_of_a_stubs_stream_is_its_last_line(pair: Pair) -> None:
    said = TEXT.splitlines(keepends=True)[0] + b'{"error":"broken"}\n'
    mine, real = pair.ask("POST", "/api/generate", {"model": "mine", "prompt": "p"}, said=said)
    assert_same(mine[0], real[0])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"model": "far", "messages": [USER]}),
        ("/api/generate", {"model": "far", "prompt": "p"}),
        ("/api/chat", {"model": "mine:local", "messages": [USER]}),
        ("/api/generate", {"model": "mine:local", "prompt": "p"}),
        ("/api/show", {"model": "mine:local"}),
        ("/api/chat", {"model": "x:cloud:local", "messages": [USER]}),
        ("/api/experimental/web_search", b""),
        ("/api/experimental/web_fetch", b" "),
        ("/api/create", {"model": "m", "from": "big", "remote_host": "a b"}),
    ],
)
def test_refusal_of_our_own_is_ollamas(path: str, body: Any, pair: Pair) -> None:
    mine, real = pair.ask("POST", path, body)
    assert (mine[0].status, mine[0].json) == (real[0].status, real[0].json)
    assert mine[1] == real[1] == []


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/v1/chat/completions?x=1", {"model": "big:cloud", "messages": [], "new": 1}),
        ("GET", "/v1/models/big:cloud?x=1", None),
        ("POST", "/api/experimental/web_search?z=1", {"query": "x", "new": 1}),
        ("POST", "/api/experimental/web_fetch", {"url": "x"}),
    ],
)
@pytest.mark.parametrize("status", [200, 403, 429, 503])
def test_request_for_the_cloud_and_its_answer_pass_as_through_ollama(
    method: str, target: str, body: Any, status: int, pair: Pair
) -> None:
    mine, real = pair.ask(method, target, body, said=b'{"error":"as it is"}', status=status)
    assert (mine[0].status, mine[0].headers["content-type"], mine[0].body) == (
        real[0].status, real[0].headers["content-type"], real[0].body,
    )  # fmt: skip
    assert [parsed(row) for row in mine[1]] == [parsed(row) for row in real[1]]


def parsed(row: tuple[str, str, str, bytes]) -> tuple[Any, ...]:
    """Go writes the members of an object in another order."""
    return (*row[:3], json.loads(row[3]) if row[3] else None)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show"])
def test_model_of_the_cloud_answers_as_through_ollama(path: str, pair: Pair) -> None:
    body = {"model": "big:1t-cloud", "messages": [USER], "prompt": "p", "input": "i"}
    mine, real = pair.ask("POST", f"{path}?b=2&a=1", body, said=CHAT, kind="application/x-ndjson")
    assert mine[0].body == real[0].body == CHAT
    assert [row[:3] for row in mine[1]] == [row[:3] for row in real[1]] == [("POST", path, "a=1&b=2")]
    assert json.loads(mine[1][0][3])["model"] == json.loads(real[1][0][3])["model"] == "big:1t"
