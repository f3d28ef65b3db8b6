"""Logging of a server process: one line per event, allow-listed fields, and a last filter that no secret passes.

Records may carry `extra={"fields": {...}}`; only the names in `FIELDS` are written, each neutralised, so that a forgotten header
or body can never reach a log by accident. The mask runs on the finished line, after tracebacks are attached: it is the net below
the rule that secrets are not logged at all (security.md 5, T113, T114).
"""

import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import TextIO

#: The fields an access or server record may carry, in the order they are written.
FIELDS = (
    "request_id",
    "method",
    "path",
    "status",
    "duration_ms",
    "account",
    "credential",
    "network",
    "model",
    "action",
    "subject",
    "outcome",
    "detail",
)

_MASKS = (
    # An OpenSSH private key, however it was folded into one line; without its end marker everything behind it goes.
    (re.compile(r"-----BEGIN OPENSSH.*?(?:END OPENSSH[A-Z ]*-----|$)", re.DOTALL), "[private key]"),
    (re.compile(r"BEGIN OPENSSH"), "[private key]"),
    (re.compile(r"crl[ksd]_[0-9A-Za-z]+"), "crl*_***"),
    # A stock device header: public key and signature. The signature can be used again for as long as its window is open.
    (re.compile(r"[A-Za-z0-9+/]{68}:[A-Za-z0-9+/=]{20,}"), "[device header]"),
    (re.compile(r"(?i)\b(bearer|basic)[ +:]+[^\s\"',;]+"), r"\1 ***"),
    (re.compile(r"(?i)\b(sig|signature|code|key|token|password)=[^\s&\"';,]+"), r"\1=***"),
)
#: Everything that can move a cursor, end a line or hide text: C0, DEL, C1, line separators and bidirectional controls.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MAX_FIELD = 300
_QUOTED = re.compile(r"[\s\"=]")


def mask(text: str) -> str:
    """The text without anything that could be used as a credential."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def one_line(text: str) -> str:
    """The text with every control character written out, so that it stays one line and moves no cursor."""
    return _CONTROLS.sub(lambda match: _written_out(match[0]), text)


def _written_out(character: str) -> str:
    known = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}
    return known.get(character) or f"\\u{ord(character):04x}"


class LineFormatter(logging.Formatter):
    """`2026-11-23T05:17:24.123Z info corral.access request method=GET path=/ status=200`; a traceback stays on the line."""

    def format(self, record: logging.LogRecord) -> str:
        """One masked, neutralised line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [f"{when}.{int(record.msecs):03d}Z", record.levelname.lower(), record.name, record.getMessage()]
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            parts += [f"{name}={_field(fields[name])}" for name in FIELDS if fields.get(name) not in (None, "")]
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        # Masked twice: before, because a secret may be split by what is neutralised, and after, because one may be joined by it.
        return mask(one_line(mask(" ".join(parts))))


def _field(value: object) -> str:
    text = str(value)[:_MAX_FIELD]
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if _QUOTED.search(text) else text


def set_up_logging(debug: int, *, stream: TextIO | None = None) -> None:
    """Send this process's records to `stream` (standard error). debug 0: warnings and worse; 1: requests as well; 2: all of ours.
    Libraries are held to warnings, since some log request heads."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("corral").setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[debug])
    # What the HTTP server says of requests it cannot parse, and of those that we ended ourselves, is for whoever looks closely.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING if debug > 1 else logging.CRITICAL)
    # A handler that cannot write (a closed pipe) must not print a traceback with the record's arguments.
    logging.raiseExceptions = False
