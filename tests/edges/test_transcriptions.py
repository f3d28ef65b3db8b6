"""Recordings written down: the form in every state, the chat that is made of it, and the answer in both its forms."""

from typing import Any

import pytest

from api_servers import KINDS, ApiServer, Kind
from asgi_client import Answer
from corral.core.ports import ChatCall, Chunk
from fakes_inference import STOP, FakeRunner

PATH = "/v1/audio/transcriptions"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
MULTIPART = "multipart/form-data; boundary=XX"


def form(file: bytes | None = WAV, /, **texts: str) -> bytes:
    parts = [f'--XX\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode() for name, text in texts.items()]
    if file is not None:
        head = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        parts.append(head + file + b"\r\n")
    return b"".join(parts) + b"--XX--\r\n"


async def sent(server: ApiServer, body: bytes, content_type: str = MULTIPART, **options: Any) -> Answer:
    return await server.post(PATH, raw=body, headers={"content-type": content_type}, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("response_format", "content_type", "body"),
    [
        ("", "application/json", b'{"text":"Hello there."}'),
        ("json", "application/json", b'{"text":"Hello there."}'),
        ("verbose_json", "application/json", b'{"text":"Hello there."}'),
        ("text", "text/plain; charset=utf-8", b"Hello there."),
    ],
)
async def test_recording_is_written_down(kind: Kind, response_format: str, content_type: str, body: bytes) -> None:
    server = ApiServer(kind, FakeRunner(Chunk(content=" Hello "), Chunk(content="there.\n"), STOP))
    answer = await sent(server, form(model="m", response_format=response_format))
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, content_type, body)


async def test_model_hears_the_recording_and_what_is_known_of_it() -> None:
    server = ApiServer()
    await sent(server, form(model="m", language="Norwegian", prompt="fjords"))
    (call,) = server.runner.calls
    assert isinstance(call, ChatCall)
    system, question = call.messages
    assert (system["role"], "Norwegian" in system["content"], "fjords" in system["content"]) == ("system", True, True)
    assert [part["type"] for part in question["content"]] == ["text", "input_audio"]
    assert question["content"][1]["input_audio"] == {"data": "UklGRiQAAABXQVZFZm10IA==", "format": "wav"}
    assert call.sampling.values["temperature"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("body", "content_type", "status", "text"),
    [
        (form(), MULTIPART, 400, "model is required"),
        (form(model=""), MULTIPART, 400, "model is required"),
        (form(None, model="m"), MULTIPART, 400, "file is required: http: no such file"),
        (form(None, model="m", file="a text"), MULTIPART, 400, "file is required: http: no such file"),
        (form(b"", model="m"), MULTIPART, 400, "audio file is empty"),
        (form(model="x"), MULTIPART, 404, "model 'x' not found"),
        (b"{}", "application/json", 400, "failed to parse multipart form: request Content-Type isn't multipart/form-data"),
        (b"", "", 400, "failed to parse multipart form: request Content-Type isn't multipart/form-data"),
        (b"{}", "multipart/form-data", 400, "failed to parse multipart form: no multipart boundary param in Content-Type"),
        (form(model="m")[:-8], MULTIPART, 400, "failed to parse multipart form: multipart: NextPart: EOF"),
        (b"--XX\r\nbroken", MULTIPART, 400, "failed to parse multipart form: multipart: NextPart: EOF"),
        (b"no form", MULTIPART, 400, "failed to parse multipart form: the form ends too early or is broken"),
    ],
)
async def test_form_that_lacks_something_is_refused(body: bytes, content_type: str, status: int, text: str, kind: Kind) -> None:
    answer = await sent(ApiServer(kind), body, content_type)
    kind_of_error = "not_found_error" if status == 404 else "invalid_request_error"
    expected = {"error": {"message": text, "type": kind_of_error, "param": None, "code": None}}
    assert (answer.status, answer.json()) == (status, expected)


async def test_form_of_many_or_large_fields_is_refused() -> None:
    many = form(model="m", **{f"f{number}": "" for number in range(101)})
    assert (await sent(ApiServer(), many)).status == 400
    assert (await sent(ApiServer(), form(model="m" * 70_000))).status == 413
    too_large = {"content-type": MULTIPART, "content-length": str(27 * 1024 * 1024)}
    assert (await ApiServer().post(PATH, raw=b"x", headers=too_large)).status == 413


async def test_model_at_the_hub_is_not_mistaken_for_one_of_this_machine() -> None:
    answer = await sent(ApiServer(), form(model="m:cloud"))
    assert (answer.status, answer.json()["error"]["message"]) == (501, "this route runs models of this machine only")
