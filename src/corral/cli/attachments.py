"""Pictures and sound by their path in a question: found in its text, looked at, taken along.

Only a path that begins like one is looked for (`/`, `./`, `../`, `~/`, a drive), with the endings that models can use, and only a
file that is there and is what its ending says is sent. What merely looks like a path stays text.
Source: ollama cmd/interactive.go extractFileNames, getImageData, fb30760.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from corral.cli.context import Failed

MAX_FILE_BYTES = 100 * 1024 * 1024
_MAX_MB = MAX_FILE_BYTES // (1024 * 1024)
#: A blank may stand in a path as it is or behind a backslash, as terminals write what is dragged into them.
_PATH = re.compile(r"(?:[A-Za-z]:|~|\.\.?)?[/\\][\S\\ ]{1,1024}?\.(?:jpg|jpeg|png|webp|wav)\b", re.IGNORECASE)
#: Where within such a text another path may begin: `a / b /tmp/x.png` names one file.
_LATER_START = re.compile(r"(?<=\s)(?:[A-Za-z]:|~|\.\.?)?[/\\]")
_ESCAPED = re.compile(r"\\([ ()\[\]{}$&;'\\*?~])")
_HEAD_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A file to send. data: base64. kind: `image` or `audio`."""

    path: str
    kind: str
    data: str


def paths_in(text: str) -> list[str]:
    """What in the text looks like the path of a picture or sound, as it stands there."""
    return _PATH.findall(text)


def take_attachments(text: str, home: Path) -> tuple[str, list[Attachment]]:
    """The text without the files it names, and those files. Raises: Failed for a file of another kind, or too large."""
    taken = []
    for candidate in paths_in(text):
        found = _file_of(candidate, home)
        if found is None:
            continue
        written, path, shown = found
        taken.append(_read(path, shown=shown))
        for spelling in (f"'{shown}'", f"'{written}'", f'"{shown}"', written):
            text = text.replace(spelling, "")
    return text.strip(), taken


def _file_of(candidate: str, home: Path) -> tuple[str, Path, str] | None:
    """(as it is written, where it is, its path without escapes) of the first file that a candidate names."""
    for start in (0, *(found.start() for found in _LATER_START.finditer(candidate, 1))):
        written = candidate[start:]
        shown = _ESCAPED.sub(r"\1", written)
        path = home / shown[2:] if shown.startswith("~/") else Path(shown)
        if _is_file(path):
            return written, path, shown
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Prose behind a slash makes longer names than a file can have, and some folders are not ours to look into.
        return False


def _read(path: Path, *, shown: str) -> Attachment:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            kind = kind_of(head)
            if not kind:
                raise Failed(f"couldn't process file '{shown}': it is no JPEG, PNG or WebP image and no WAV audio")
            content = head + file.read(MAX_FILE_BYTES + 1 - len(head))
    except OSError as error:
        raise Failed(f"couldn't process file '{shown}': {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise Failed(f"couldn't process file '{shown}': file size exceeds maximum limit ({_MAX_MB}MB)")
    return Attachment(path=shown, kind=kind, data=base64.b64encode(content).decode())


def kind_of(head: bytes) -> str:
    """`image` or `audio` by a file's first 12 bytes; empty for anything else."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        return "image"
    return {b"WEBP": "image", b"WAVE": "audio"}.get(head[8:12], "") if head.startswith(b"RIFF") else ""
