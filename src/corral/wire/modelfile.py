"""Modelfiles: the text that says how a model is made, read and written.

A Modelfile is a list of instructions, one a line: a word in any case, then a value to the end of the line. A value in double
quotes, or in three of them, may span lines and keep blanks at its ends; nothing is escaped, so a value ends at the first line
that ends in the quotes it began with. A line that begins with `#` is a comment. Unlike Ollama we keep characters that do not
print (joiners inside an emoji), and count a line that ends in CR LF as one (docs/divergences.md).

Source: ollama parser/parser.go, api/types.go FormatParams, fb30760.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from corral.wire.errors import CorralError

T = TypeVar("T")

#: Far more than any; a licence or a few-shot conversation takes tens of kilobytes.
MAX_MODELFILE_BYTES = 4 << 20

COMMANDS = (
    *("from", "license", "template", "system", "adapter", "draft"),
    *("renderer", "parser", "parameter", "message", "requires"),
)
#: Understood and passed over, with a warning.
DEPRECATED_PARAMETERS = frozenset(
    {
        "penalize_newline",
        "low_vram",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "use_mlock",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
    }
)
_ROLES = ("system", "user", "assistant")
_INTEGERS = frozenset(
    {
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"),
        *("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"),
    }
)
_FLOATS = frozenset({"top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"})
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_FLOAT_TEXT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SEMVER = re.compile(
    r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?)?)?"
)

#: What Go's strings.TrimSpace takes away.
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_INSTRUCTION = re.compile(r"([A-Za-z]*)([ \t]?)")
#: The name of a parameter, or a role.
_ARGUMENT = re.compile(r"[ \t]*([A-Za-z0-9_]*)([ \t]?)")

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. command: one of COMMANDS. argument: the name of a parameter or the role of a message, else empty. line:
    where it begins, from 1; not part of what it says."""

    command: str
    value: str
    argument: str = ""
    line: int = field(default=0, compare=False)


def parse_modelfile(data: bytes) -> tuple[Instruction, ...]:
    """The instructions in their order. data: UTF-8, or UTF-16 with its mark. Raises: bad_request with the line's number."""
    if len(data) > MAX_MODELFILE_BYTES:
        raise CorralError("bad_request", f"the Modelfile has {len(data)} bytes; at most {MAX_MODELFILE_BYTES} are read")
    lines = [found[0] for found in _LINE.finditer(_decoded(data))]
    instructions: list[Instruction] = []
    at = 0
    while at < len(lines):
        text = lines[at].strip(_BLANKS)
        if not text or text.startswith("#"):
            at += 1
            continue
        instruction, taken = _instruction(lines, at)
        instructions.append(instruction)
        at += taken
    if not any(instruction.command == "from" for instruction in instructions):
        raise CorralError("bad_request", "no FROM line")
    return tuple(instructions)


def _decoded(data: bytes) -> str:
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    return data.decode("utf-8", "replace")


def _instruction(lines: Sequence[str], at: int) -> tuple[Instruction, int]:
    """The instruction that begins on that line, and how many lines it takes."""
    line, number = lines[at].lstrip(_BLANKS), at + 1
    head = _INSTRUCTION.match(line)
    assert head is not None  # the pattern matches the empty text
    command, rest = head[1].lower(), line[head.end() :]
    if command not in COMMANDS:
        listed = ", ".join(f'"{name}"' for name in COMMANDS[:-1])
        raise _error(number, f'command must be one of {listed}, or "{COMMANDS[-1]}"')
    if not head[2]:
        raise _error(number, f"unexpected EOF: {head[1]}" if not rest.strip(_BLANKS) else f"a space must follow {head[1]}")
    argument = ""
    if command in ("parameter", "message"):
        found = _ARGUMENT.match(rest)
        assert found is not None  # the pattern matches the empty text
        argument, rest = found[1], rest[found.end() :]
        if command == "message" and argument not in _ROLES:
            raise _error(number, 'message role must be one of "system", "user", or "assistant"')
        if not argument or not found[2]:
            raise _error(number, f"unexpected EOF: {argument or head[1]}")
    value, taken = _value(rest, lines, at)
    return Instruction(command, value, argument, number), taken


def _error(line: int, text: str) -> CorralError:
    return CorralError("bad_request", f"(line {line}): {text}")


def _value(rest: str, lines: Sequence[str], at: int) -> tuple[str, int]:
    """The value that begins with rest, and how many lines it takes. Quotes close at the end of a line only."""
    start = rest.lstrip(_BLANKS)
    quotes = '"""' if start.startswith('"""') else '"' if start.startswith('"') else ""
    if not quotes:
        return rest.strip(_BLANKS), 1
    pieces: list[str] = []
    piece, end = start[len(quotes) :], at + 1
    while True:
        trimmed = piece.rstrip(_BLANKS)
        if trimmed.endswith(quotes):
            pieces.append(trimmed[: -len(quotes)])
            return "".join(pieces), end - at
        if end == len(lines):
            raise _error(at + 1, f"unexpected EOF: the value that begins here with {quotes} does not end")
        pieces.append(piece)
        piece, end = lines[end], end + 1


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def format_instruction(instruction: Instruction) -> str:
    """One instruction as it stands in a file, without a line end.

    Quotes are added only where the value could not be read back without. The one text that no quotes can hold, because the format
    has no escapes, has lines that end in three of them; it is written as it is.
    """
    argument = f"{instruction.argument} " if instruction.argument else ""
    return f"{instruction.command.upper()} {argument}{_quoted(instruction.value)}"


def format_modelfile(instructions: Iterable[Instruction]) -> str:
    """All of them, one below the other."""
    return "".join(f"{format_instruction(instruction)}\n" for instruction in instructions)


def _quoted(value: str) -> str:
    if not ("\n" in value or "\r" in value or value != value.strip(_BLANKS) or value.startswith('"')):
        return value
    return f'"""{value}"""' if '"' in value else f'"{value}"'


# ── What the instructions ask for ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A Modelfile as a request to make a model. sources, drafts, adapters: what FROM, DRAFT and ADAPTER name, in order; to be
    looked up among the files. fields: everything else, as POST /api/create takes it. deprecated: parameters passed over."""

    sources: tuple[str, ...]
    drafts: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    deprecated: tuple[str, ...] = ()


def recipe_of(instructions: Iterable[Instruction]) -> Recipe:
    """What the instructions ask for. Raises: bad_request with the line's number, and Ollama's text for a parameter or version it
    would not take."""
    named: dict[str, list[str]] = {"from": [], "draft": [], "adapter": []}
    fields: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    deprecated: list[str] = []
    for one in instructions:
        match one.command:
            case "from" | "draft" | "adapter":
                if not one.value:
                    raise _error(one.line, f"{one.command.upper()} needs a value")
                named[one.command].append(one.value)
            case "license":
                fields.setdefault("license", []).append(one.value)
            case "message":
                fields.setdefault("messages", []).append({"role": one.argument, "content": one.value})
            case "parameter" if one.argument in DEPRECATED_PARAMETERS:
                deprecated.append(one.argument)
            case "parameter" if one.argument == "stop":
                parameters.setdefault("stop", []).append(one.value)
            case "parameter":
                parameters[one.argument] = _at_line(one, partial(parse_parameter, one.argument))
            case "requires":
                fields["requires"] = _at_line(one, _version)
            case _:
                fields[one.command] = one.value
    if parameters:
        fields["parameters"] = parameters
    sources, drafts, adapters = (tuple(names) for names in named.values())
    return Recipe(sources=sources, drafts=drafts, adapters=adapters, fields=fields, deprecated=tuple(deprecated))


def _at_line(one: Instruction, read: Callable[[str], T]) -> T:
    try:
        return read(one.value)
    except CorralError as error:
        raise _error(one.line, error.message) from error


def parse_parameter(name: str, text: str) -> object:
    """The value of a parameter out of its text; a list for `stop`. Raises: bad_request with Ollama's text."""
    if name == "stop":
        return [text]
    if name in _INTEGERS:
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
            raise CorralError("bad_request", f"invalid int value [{text}]")
        return int(text)
    if name in _FLOATS:
        # What is larger than a single-precision number is none for an engine either.
        if not _FLOAT_TEXT.fullmatch(text) or abs(float(text)) > 3.4028235e38:
            raise CorralError("bad_request", f"invalid float value [{text}]")
        return float(text)
    if name == "use_mmap":
        if text not in _TRUE | _FALSE:
            raise CorralError("bad_request", f"invalid bool value [{text}]")
        return text in _TRUE
    raise CorralError("bad_request", f"unknown parameter '{name}'")


def _version(text: str) -> str:
    """A semantic version without its leading `v`."""
    version = text.removeprefix("v")
    if not _SEMVER.fullmatch(version):
        raise CorralError("bad_request", "requires must be a valid semver (e.g. 0.14.0)")
    return version
