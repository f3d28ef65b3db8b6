"""Reference traces, byte by byte, on both servers: whole answers and every line or event of streams, with their headers.

What changes with the time and what is drawn (ids) is fixed or cut out; all else is compared as it travels. Source: the answers of
the real server to the same requests over an engine that said the same (fb30760).
"""

import json
import re
from typing import Any

import pytest

from api_servers import KINDS, ApiServer, Kind
from asgi_client import Answer, Caller
from corral.core.ports import Chunk, Finish, Timings
from corral.edges.asgi import App, AppOptions
from corral.edges.library_api import transfer_endpoints
from corral.wire.create import ProgressEvent
from fakes_inference import STOP, FakeRunner, Step

TIME = "2026-09-21T14:13:20Z"
SECONDS = 1790000000
METRICS = (
    '"load_duration":41234567,"prompt_eval_count":11,"prompt_eval_duration":70000000,"eval_count":9,"eval_duration":300000000'
)
HI = [{"role": "user", "content": "hi"}]
WEATHER = {"name": "get_weather", "description": "", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "call_ab12cd34", "function": {"name": "get_weather", "arguments": '{"city":"Oslo","days":2,"hot":null}'}}
SHORT = Finish(reason="stop", timings=Timings(prompt_tokens=3, eval_tokens=2))
TOKEN = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [{"token": "e", "logprob": -1.5, "bytes": [101]}]}


async def answered(kind: Kind, path: str, body: dict[str, Any], *answer: Step) -> Answer:
    return await ApiServer(kind, FakeRunner(*answer)).post(path, {"model": "m", **body})


def fixed(text: bytes) -> str:
    """Without what is drawn for each answer."""
    shown = text.decode()
    for kind, pattern in (
        ("chatcmpl", r"chatcmpl-\d+"),
        ("cmpl", r"(?<!chat)cmpl-\d+"),
        ("resp", r"resp_\d+"),
        ("msg", r"msg_[0-9a-f]{24}"),
        ("item", r"(?<=\")(?:rs|msg|fc)_\d+(?=_\d)"),
    ):
        shown = re.sub(pattern, kind, shown)
    return shown


def stream_of(answer: Answer, content_type: str) -> str:
    assert (answer.status, answer.headers["content-type"]) == (200, content_type)
    assert answer.headers["cache-control"] == "no-store"
    assert "content-length" not in answer.headers
    return fixed(answer.body)


def whole_of(answer: Answer, content_type: str) -> str:
    assert (answer.status, answer.headers["content-type"]) == (200, content_type)
    assert answer.headers["content-length"] == str(len(answer.body))
    return fixed(answer.body)


NDJSON, JSON, PLAIN, SSE = "application/x-ndjson", "application/json; charset=utf-8", "application/json", "text/event-stream"
HEAD = f'{{"model":"m","created_at":"{TIME}",'


# ── Native ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_that_thinks(kind: Kind) -> None:
    answer = await answered(
        kind, "/api/chat", {"messages": HI, "think": True}, Chunk(thinking="User greets"), Chunk(content="Hello"), STOP
    )
    assert stream_of(answer, NDJSON) == (
        HEAD + '"message":{"role":"assistant","content":"","thinking":"User greets"},"done":false}\n'
        + HEAD + '"message":{"role":"assistant","content":"Hello"},"done":false}\n'
        + HEAD + f'"message":{{"role":"assistant","content":""}},"done":true,"done_reason":"stop",{METRICS}}}\n'
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_that_thinks_collected(kind: Kind) -> None:
    answer = await answered(
        kind, "/api/chat", {"messages": HI, "stream": False}, Chunk(thinking="User greets"), Chunk(content="Hello"), STOP
    )
    assert whole_of(answer, JSON) == (
        HEAD + '"message":{"role":"assistant","content":"Hello","thinking":"User greets"},"done":true,"done_reason":"stop",'
        f"{METRICS}}}"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_chat_that_calls_a_tool(kind: Kind, is_stream: bool) -> None:
    body = {"messages": HI, "tools": TOOLS, "stream": is_stream}
    answer = await answered(kind, "/api/chat", body, Chunk(tool_calls=[CALL]), STOP)
    line = (
        HEAD + '"message":{"role":"assistant","content":"","tool_calls":[{"id":"call_ab12cd34","function":'
        '{"index":0,"name":"get_weather","arguments":{"city":"Oslo","days":2,"hot":null}}}]},"done":true,"done_reason":"stop",'
        f"{METRICS}}}"
    )
    assert (stream_of(answer, NDJSON) if is_stream else whole_of(answer, JSON)) == line + ("\n" if is_stream else "")


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_with_likelihoods(kind: Kind) -> None:
    body = {"messages": HI, "logprobs": True, "top_logprobs": 1}
    answer = await answered(kind, "/api/chat", body, Chunk(content="é", logprobs=[TOKEN]), STOP)
    assert stream_of(answer, NDJSON) == (
        HEAD + '"message":{"role":"assistant","content":"é"},"done":false,"logprobs":[{"token":"é","logprob":-0.5,'
        '"bytes":[195,169],"top_logprobs":[{"token":"e","logprob":-1.5,"bytes":[101]}]}]}\n'
        + HEAD + f'"message":{{"role":"assistant","content":""}},"done":true,"done_reason":"stop",{METRICS}}}\n'
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_generation(kind: Kind) -> None:
    answer = await answered(
        kind, "/api/generate", {"prompt": "hi"}, Chunk(thinking="hm"), Chunk(content="Hel"), Chunk(content="lo"), STOP
    )
    assert stream_of(answer, NDJSON) == (
        HEAD + '"response":"","thinking":"hm","done":false}\n'
        + HEAD + '"response":"Hel","done":false}\n'
        + HEAD + '"response":"lo","done":false}\n'
        + HEAD + f'"response":"","done":true,"done_reason":"stop","context":[5,7],{METRICS}}}\n'
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_generation_collected_at_its_limit_and_raw(kind: Kind) -> None:
    end = Finish(reason="length", timings=Timings(prompt_tokens=3, eval_tokens=2))
    answer = await answered(kind, "/api/generate", {"prompt": "hi", "raw": True, "stream": False}, Chunk(content="Hello"), end)
    assert whole_of(answer, JSON) == (
        HEAD
        + '"response":"Hello","done":true,"done_reason":"length","load_duration":41234567,"prompt_eval_count":3,"eval_count":2}'
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("more", "reason"), [({}, "load"), ({"keep_alive": 0}, "unload"), ({"keep_alive": "0s"}, "unload")])
async def test_loading_and_unloading(kind: Kind, more: dict[str, Any], reason: str) -> None:
    answer = await answered(kind, "/api/generate", more)
    assert whole_of(answer, JSON) == HEAD + f'"response":"","done":true,"done_reason":"{reason}"}}'
    answer = await answered(kind, "/api/chat", more)
    assert (
        whole_of(answer, JSON) == HEAD + f'"message":{{"role":"assistant","content":""}},"done":true,"done_reason":"{reason}"}}'
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_prompt_that_is_only_shown(kind: Kind) -> None:
    answer = await answered(kind, "/api/generate", {"prompt": "hi", "images": ["aGk="], "_debug_render_only": True})
    assert whole_of(answer, JSON) == (
        HEAD + '"response":"","done":false,"_debug_info":{"rendered_template":"user: hi ","image_count":1}}'
    )
    answer = await answered(kind, "/api/chat", {"messages": HI, "_debug_render_only": True})
    assert whole_of(answer, JSON) == (
        HEAD + '"message":{"role":"assistant","content":""},"done":false,"_debug_info":{"rendered_template":"user: hi"}}'
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_vectors(kind: Kind) -> None:
    answer = await answered(kind, "/api/embed", {"input": ["a b", "c"]})
    assert whole_of(answer, JSON) == (
        '{"model":"m","embeddings":[[0.6,0.8],[0.6,0.8]],"load_duration":41234567,"prompt_eval_count":3}'
    )
    answer = await answered(kind, "/api/embed", {"input": "a", "dimensions": 1})
    assert whole_of(answer, JSON) == '{"model":"m","embeddings":[[1.0]],"load_duration":41234567,"prompt_eval_count":1}'
    for nothing in ("", [], None):
        assert whole_of(await answered(kind, "/api/embed", {"input": nothing}), JSON) == '{"model":"m","embeddings":[]}'
    assert whole_of(await answered(kind, "/api/embeddings", {"prompt": "a"}), JSON) == '{"embedding":[3.0,4.0]}'
    assert whole_of(await answered(kind, "/api/embeddings", {}), JSON) == '{"embedding":[]}'


class _Transfer:
    """A pull that goes as the trace says."""

    async def pull(self, requested: str, *, insecure: bool = False) -> Any:
        yield ProgressEvent(status="pulling manifest")
        digest = "sha256:0123456789ab" + "0" * 52
        yield ProgressEvent(status="pulling 0123456789ab", digest=digest, total=1000, completed=400)
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            yield ProgressEvent(status=status)

    async def push(self, requested: str, *, insecure: bool = False, visibility: Any = None) -> Any:
        yield ProgressEvent(status="retrieving manifest")


async def test_pull() -> None:
    app = App(transfer_endpoints(_Transfer()), AppOptions())
    answer = await Caller(app).request("POST", "/api/pull", body=b'{"model":"m"}')
    assert stream_of(answer, NDJSON) == (
        '{"status":"pulling manifest"}\n'
        f'{{"status":"pulling 0123456789ab","digest":"sha256:0123456789ab{"0" * 52}","total":1000,"completed":400}}\n'
        '{"status":"verifying sha256 digest"}\n'
        '{"status":"writing manifest"}\n'
        '{"status":"success"}\n'
    )
    answer = await Caller(app).request("POST", "/api/pull", body=b'{"model":"m","stream":false}')
    assert whole_of(answer, PLAIN) == '{"status":"success"}'


# ── OpenAI ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CHUNK = (
    f'data: {{"id":"chatcmpl","object":"chat.completion.chunk","created":{SECONDS},"model":"m","system_fingerprint":"fp_ollama",'
)
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_completion_with_usage(kind: Kind) -> None:
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    answer = await answered(kind, "/v1/chat/completions", body, Chunk(content="Hel"), Chunk(content="lo"), SHORT)
    assert stream_of(answer, SSE) == (
        CHUNK + '"choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"},"finish_reason":null}]}\n\n'
        + CHUNK + '"choices":[{"index":0,"delta":{"content":"lo"},"finish_reason":null}]}\n\n'
        + CHUNK + '"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        + CHUNK + '"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
        + DONE
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_completion_that_thinks_and_calls(kind: Kind) -> None:
    body = {"messages": HI, "tools": TOOLS, "stream": True}
    answer = await answered(kind, "/v1/chat/completions", body, Chunk(thinking="hm"), Chunk(tool_calls=[CALL]), SHORT)
    call = (
        '{"id":"call_ab12cd34","index":0,"type":"function","function":{"name":"get_weather",'
        '"arguments":"{\\"city\\":\\"Oslo\\",\\"days\\":2,\\"hot\\":null}"}}'
    )
    assert stream_of(answer, SSE) == (
        CHUNK + '"choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"hm"},"finish_reason":null}]}\n\n'
        + CHUNK + f'"choices":[{{"index":0,"delta":{{"content":"","tool_calls":[{call}]}},"finish_reason":null}}]}}\n\n'
        + CHUNK + '"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\n'
        + DONE
    )  # fmt: skip
    answer = await answered(
        kind, "/v1/chat/completions", {**body, "stream": False}, Chunk(thinking="hm"), Chunk(tool_calls=[CALL]), SHORT
    )
    assert whole_of(answer, PLAIN) == (
        f'{{"id":"chatcmpl","object":"chat.completion","created":{SECONDS},"model":"m","system_fingerprint":"fp_ollama",'
        f'"choices":[{{"index":0,"message":{{"role":"assistant","content":"","reasoning":"hm","tool_calls":[{call}]}},'
        '"finish_reason":"tool_calls"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_completion_with_likelihoods(kind: Kind) -> None:
    body = {"messages": HI, "logprobs": True, "top_logprobs": 1}
    answer = await answered(kind, "/v1/chat/completions", body, Chunk(content="é", logprobs=[TOKEN]), SHORT)
    assert whole_of(answer, PLAIN) == (
        f'{{"id":"chatcmpl","object":"chat.completion","created":{SECONDS},"model":"m","system_fingerprint":"fp_ollama",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"é"},"finish_reason":"stop","logprobs":{"content":'
        '[{"token":"é","logprob":-0.5,"bytes":[195,169],"top_logprobs":[{"token":"e","logprob":-1.5,"bytes":[101]}]}]}}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_completion(kind: Kind) -> None:
    answer = await answered(kind, "/v1/completions", {"prompt": "hi"}, Chunk(content="Hello"), SHORT)
    assert whole_of(answer, PLAIN) == (
        f'{{"id":"cmpl","object":"text_completion","created":{SECONDS},"model":"m","system_fingerprint":"fp_ollama",'
        '"choices":[{"text":"Hello","index":0,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    )
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    answer = await answered(kind, "/v1/completions", body, Chunk(content="Hello"), SHORT)
    head, tail = (
        f'data: {{"id":"cmpl","object":"text_completion","created":{SECONDS},"choices":',
        ',"model":"m","system_fingerprint":"fp_ollama","usage":{"prompt_tokens":',
    )
    assert stream_of(answer, SSE) == (
        head + '[{"text":"Hello","index":0,"finish_reason":null}]' + tail + '0,"completion_tokens":0,"total_tokens":0}}\n\n'
        + head + '[{"text":"","index":0,"finish_reason":"stop"}]' + tail + '0,"completion_tokens":0,"total_tokens":0}}\n\n'
        + head + "[]" + tail + '3,"completion_tokens":2,"total_tokens":5}}\n\n'
        + DONE
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_embedding_list(kind: Kind) -> None:
    answer = await answered(kind, "/v1/embeddings", {"input": ["a b", "c"]})
    assert whole_of(answer, PLAIN) == (
        '{"object":"list","data":[{"object":"embedding","embedding":[0.6,0.8],"index":0},'
        '{"object":"embedding","embedding":[0.6,0.8],"index":1}],"model":"m","usage":{"prompt_tokens":3,"total_tokens":3}}'
    )
    answer = await answered(kind, "/v1/embeddings", {"input": "a", "encoding_format": "base64"})
    assert whole_of(answer, PLAIN) == (
        '{"object":"list","data":[{"object":"embedding","embedding":"mpkZP83MTD8=","index":0}],"model":"m",'
        '"usage":{"prompt_tokens":1,"total_tokens":1}}'
    )


def response_members(status: str, *, completed: str = "null", output: str = "[]", usage: str = "null") -> str:
    """Every member of a response, in its place."""
    return (
        f'{{"id":"resp","object":"response","created_at":{SECONDS},"completed_at":{completed},"status":"{status}",'
        '"incomplete_details":null,"model":"m","previous_response_id":null,"instructions":null,'
        f'"output":{output},"error":null,"tools":[],"tool_choice":"auto","truncation":"disabled","parallel_tool_calls":true,'
        '"text":{"format":{"type":"text"}},"top_p":1.0,"presence_penalty":0,"frequency_penalty":0,"top_logprobs":0,'
        f'"temperature":1.0,"reasoning":null,"usage":{usage},"max_output_tokens":null,"max_tool_calls":null,"store":false,'
        '"background":false,"service_tier":"default","metadata":{},"safety_identifier":null,"prompt_cache_key":null}'
    )


REASONING = '{"id":"item_0","type":"reasoning","summary":[{"type":"summary_text","text":"hm"}],"encrypted_content":"hm"}'
TEXT = '{"type":"output_text","text":"Hi","annotations":[],"logprobs":[]}'
MESSAGE = f'{{"id":"item_1","type":"message","status":"completed","role":"assistant","content":[{TEXT}]}}'
USAGE = (
    '{"input_tokens":3,"output_tokens":2,"total_tokens":5,"input_tokens_details":{"cached_tokens":0},'
    '"output_tokens_details":{"reasoning_tokens":0}}'
)
COMPLETED = response_members("completed", completed=str(SECONDS), output=f"[{REASONING},{MESSAGE}]", usage=USAGE)


@pytest.mark.parametrize("kind", KINDS)
async def test_response(kind: Kind) -> None:
    answer = await answered(kind, "/v1/responses", {"input": "hi"}, Chunk(thinking="hm"), Chunk(content="Hi"), SHORT)
    assert whole_of(answer, PLAIN) == COMPLETED


@pytest.mark.parametrize("kind", KINDS)
async def test_response_in_events(kind: Kind) -> None:
    answer = await answered(
        kind, "/v1/responses", {"input": "hi", "stream": True}, Chunk(thinking="hm"), Chunk(content="Hi"), SHORT
    )
    begun = f'"response":{response_members("in_progress")}'
    rs, msg = '"item_id":"item_0","output_index":0,"summary_index":0', '"item_id":"item_1","output_index":1,"content_index":0'
    empty = '{"type":"output_text","text":"","annotations":[],"logprobs":[]}'
    rows = [
        ("created", begun),
        ("in_progress", begun),
        ("output_item.added", '"output_index":0,"item":{"id":"item_0","type":"reasoning","summary":[]}'),
        ("reasoning_summary_text.delta", rs + ',"delta":"hm"'),
        ("reasoning_summary_text.done", rs + ',"text":"hm"'),
        ("output_item.done", f'"output_index":0,"item":{REASONING}'),
        (
            "output_item.added",
            '"output_index":1,"item":{"id":"item_1","type":"message","status":"in_progress","role":"assistant","content":[]}',
        ),
        ("content_part.added", f'{msg},"part":{empty}'),
        ("output_text.delta", msg + ',"delta":"Hi","logprobs":[]'),
        ("output_text.done", msg + ',"text":"Hi","logprobs":[]'),
        ("content_part.done", f'{msg},"part":{TEXT}'),
        ("output_item.done", f'"output_index":1,"item":{MESSAGE}'),
        ("completed", f'"response":{COMPLETED}'),
    ]
    assert stream_of(answer, SSE) == "".join(
        f'event: response.{name}\ndata: {{"type":"response.{name}","sequence_number":{number},{members}}}\n\n'
        for number, (name, members) in enumerate(rows)
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_response_that_calls_in_events(kind: Kind) -> None:
    body = {"input": "hi", "stream": True, "tools": [{"type": "function", **WEATHER}]}
    answer = await answered(kind, "/v1/responses", body, Chunk(tool_calls=[CALL]), SHORT)
    events = [frame.partition("\ndata: ") for frame in stream_of(answer, SSE).removesuffix("\n\n").split("\n\n")]
    arguments = '"{\\"city\\":\\"Oslo\\",\\"days\\":2,\\"hot\\":null}"'
    item = '{{"id":"item_0","type":"function_call","status":"{}","call_id":"call_ab12cd34","name":"get_weather","arguments":{}}}'
    place, begun = '"item_id":"item_0","output_index":0', item.format("in_progress", '""')
    rows = [
        ("output_item.added", f'"output_index":0,"item":{begun}'),
        ("function_call_arguments.delta", f'{place},"delta":{arguments}'),
        ("function_call_arguments.done", f'{place},"name":"get_weather","arguments":{arguments}'),
        ("output_item.done", f'"output_index":0,"item":{item.format("completed", arguments)}'),
    ]
    assert [(name, data) for name, _, data in events[2:-1]] == [
        (f"event: response.{name}", f'{{"type":"response.{name}","sequence_number":{number},{members}}}')
        for number, (name, members) in enumerate(rows, start=2)
    ]
    assert json.loads(events[-1][2])["response"]["output"] == [json.loads(item.format("completed", arguments))]


# ── Anthropic ────────────────────────────────────────────────────────────────────────────────────────────────────────


def event(name: str, members: str = "") -> str:
    return f'event: {name}\ndata: {{"type":"{name}"{"," if members else ""}{members}}}\n\n'


START = (
    '"message":{"id":"msg","type":"message","role":"assistant","model":"m","content":[],'
    '"usage":{"input_tokens":1,"output_tokens":0}}'
)
END = '"usage":{"input_tokens":3,"output_tokens":2}'


@pytest.mark.parametrize("kind", KINDS)
async def test_message_in_events(kind: Kind) -> None:
    body = {"messages": HI, "max_tokens": 9, "stream": True}
    answer = await answered(kind, "/v1/messages", body, Chunk(thinking="hm"), Chunk(content="H"), Chunk(content="i"), SHORT)
    assert stream_of(answer, SSE) == (
        event("message_start", START)
        + event("content_block_start", '"index":0,"content_block":{"type":"thinking","thinking":""}')
        + event("content_block_delta", '"index":0,"delta":{"type":"thinking_delta","thinking":"hm"}')
        + event("content_block_stop", '"index":0')
        + event("content_block_start", '"index":1,"content_block":{"type":"text","text":""}')
        + event("content_block_delta", '"index":1,"delta":{"type":"text_delta","text":"H"}')
        + event("content_block_delta", '"index":1,"delta":{"type":"text_delta","text":"i"}')
        + event("content_block_stop", '"index":1')
        + event("message_delta", '"delta":{"stop_reason":"end_turn"},' + END)
        + event("message_stop")
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_message_that_calls(kind: Kind) -> None:
    body = {"messages": HI, "max_tokens": 9, "tools": [{"name": "get_weather", "input_schema": {"type": "object"}}]}
    answer = await answered(kind, "/v1/messages", {**body, "stream": True}, Chunk(tool_calls=[CALL]), SHORT)
    _, _, events = stream_of(answer, SSE).partition("\n\n")
    partial = '"{\\"city\\":\\"Oslo\\",\\"days\\":2,\\"hot\\":null}"'
    assert events == (
        event(
            "content_block_start",
            '"index":0,"content_block":{"type":"tool_use","id":"call_ab12cd34","name":"get_weather","input":{}}',
        )
        + event("content_block_delta", f'"index":0,"delta":{{"type":"input_json_delta","partial_json":{partial}}}')
        + event("content_block_stop", '"index":0')
        + event("message_delta", '"delta":{"stop_reason":"tool_use"},' + END)
        + event("message_stop")
    )
    answer = await answered(kind, "/v1/messages", body, Chunk(thinking="hm"), Chunk(tool_calls=[CALL]), SHORT)
    assert whole_of(answer, PLAIN) == (
        '{"id":"msg","type":"message","role":"assistant","model":"m","content":[{"type":"thinking","thinking":"hm"},'
        '{"type":"tool_use","id":"call_ab12cd34","name":"get_weather","input":{"city":"Oslo","days":2,"hot":null}}],'
        '"stop_reason":"tool_use",' + END + "}"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reason", "told"), [("stop", "end_turn"), ("length", "max_tokens")])
async def test_message_says_why_it_ended(kind: Kind, reason: str, told: str) -> None:
    end = Finish(reason=reason, timings=Timings(prompt_tokens=3, eval_tokens=2))
    answer = await answered(kind, "/v1/messages", {"messages": HI, "max_tokens": 9}, Chunk(content="Hi"), end)
    assert whole_of(answer, PLAIN) == (
        '{"id":"msg","type":"message","role":"assistant","model":"m","content":[{"type":"text","text":"Hi"}],'
        f'"stop_reason":"{told}",{END}}}'
    )


# ── Inventory ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_inventory() -> None:
    server = ApiServer()
    answer = await server.call("GET", "/api/tags")
    assert whole_of(answer, JSON) == (
        f'{{"models":[{{"name":"m:latest","model":"m:latest","modified_at":"{TIME}","size":5,"digest":"{"ab" * 32}",'
        '"details":{"parent_model":"","format":"gguf","family":"llama","families":null,"parameter_size":"",'
        '"quantization_level":""},"capabilities":["completion","embedding","vision","audio","tools","insert","thinking"]}]}'
    )
    assert whole_of(await server.call("GET", "/api/ps"), JSON) == '{"models":[]}'
    model = f'{{"id":"{{}}","object":"model","created":{SECONDS},"owned_by":"library"}}'
    assert (
        whole_of(await server.call("GET", "/v1/models"), PLAIN)
        == f'{{"object":"list","data":[{model.replace("{}", "m:latest")}]}}'
    )
    assert whole_of(await server.call("GET", "/v1/models/M"), PLAIN) == model.replace("{}", "M")
    answer = await server.call("GET", "/")
    assert (answer.status, answer.body) == (200, b"Ollama is running")
