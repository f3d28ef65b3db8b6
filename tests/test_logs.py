"""T113 and T114: what a log line can never hold, whoever wrote it."""

import io
import logging
from collections.abc import Iterator

import pytest

from corral.logs import FIELDS, LineFormatter, mask, one_line, set_up_logging

KEY = "crlk_" + "9fK2" * 12
DEVICE_HEADER = "AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43 + ":" + "b" * 86 + "=="
PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in ("corral", "uvicorn.error")}
    written = io.StringIO()
    set_up_logging(2, stream=written)
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raises
    for name, former in levels.items():
        logging.getLogger(name).setLevel(former)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"got {KEY}", KEY[5:]),
        (f"key={KEY[:20]}", KEY[5:20]),
        ("Authorization: Bearer abcdef.ghi", "abcdef"),
        ("authorization: bearer abcdef", "abcdef"),
        ("Basic YWxpY2U6aHVudGVyMg==", "YWxpY2U6"),
        (f"sent {DEVICE_HEADER} off", "b" * 40),
        (PRIVATE_KEY, "c2VjcmV0"),
        (PRIVATE_KEY.replace("\n", "\\n"), "c2VjcmV0"),
        ("/v2/x?sig=deadbeef&a=1", "deadbeef"),
        ("/signup?code=7K3M-Q9XD", "7K3M"),
        ("password=hunter2", "hunter2"),
    ],
)
def test_t113_secret_in_a_line_is_masked(text: str, secret: str) -> None:
    assert secret not in mask(text)


def test_t113_mask_leaves_ordinary_text_alone() -> None:
    text = "request 1f2e method=POST path=/api/generate status=200 duration_ms=12.5 credential=k9fK2 model=smollm2:135m"
    assert mask(text) == text


def test_t113_secrets_in_arguments_exceptions_and_fields_do_not_reach_the_log(stream: io.StringIO) -> None:
    log = logging.getLogger("corral.test")
    log.warning("refused %s", KEY)
    try:
        raise ValueError(f"bad header {DEVICE_HEADER}")
    except ValueError:
        log.exception("failed with %s", PRIVATE_KEY)
    log.info("request", extra={"fields": {"path": f"/api/{KEY}", "authorization": KEY, "body": "the owl and the cat"}})
    written = stream.getvalue()
    assert "9fK29fK2" not in written
    assert "b" * 40 not in written
    assert "c2VjcmV0" not in written
    assert "the owl" not in written
    assert written.count("\n") == 3


def test_t113_field_that_is_not_on_the_list_is_not_written(stream: io.StringIO) -> None:
    assert "authorization" not in FIELDS
    logging.getLogger("corral.access").info("request", extra={"fields": {"cookie": "c", "status": 200, "method": "GET"}})
    assert stream.getvalue().endswith("info corral.access request method=GET status=200\n")


@pytest.mark.parametrize("evil", ["a\nb", "a\r\nb", "\x1b[2Ja", "a\x00b", "a\u2028b", "a\u202eb", "a\x9b31mb", "a\x7fb"])
def test_t114_control_characters_are_written_out(evil: str) -> None:
    assert one_line(evil).isprintable()
    record = logging.LogRecord("corral", logging.INFO, "", 0, "name %s", (evil,), None)
    record.fields = {"account": evil}
    line = LineFormatter().format(record)
    assert line.isprintable()
    assert "\n" not in line


def test_t114_field_cannot_pretend_to_be_another(stream: io.StringIO) -> None:
    logging.getLogger("corral.access").info("request", extra={"fields": {"account": 'x" status=200', "status": 401}})
    assert 'account="x\\" status=200"' in stream.getvalue()
    assert "status=401" in stream.getvalue()


def test_quiet_process_writes_warnings_only() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    try:
        set_up_logging(0, stream=written)
        logging.getLogger("corral.access").info("request")
        logging.getLogger("aiohttp.access").info("GET / with headers")
        logging.getLogger("uvicorn.error").error("Exception in ASGI application")
        logging.getLogger("corral.server").warning("hello")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.raiseExceptions = True
    assert written.getvalue().count("\n") == 1
