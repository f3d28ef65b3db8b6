"""The header of a GGUF file: key/values and the tensor table, read with a limit on everything.

Theory of operation. A header is a chain of length-prefixed records, so whoever reads it follows lengths that the file's author
chose. Every length is compared with the bytes that remain before anything is allocated; what is kept, and how many strings are
stepped over, is bounded for the file as a whole. Vocabularies (a quarter of a million strings) are stepped over, never built.
The source is a function that reads at an offset, so that nothing here does I/O and a file that shrinks meanwhile is a short read,
not a fault in a memory map. Numbers are little-endian.

Source: ggml docs/gguf.md; ollama fs/ggml/{gguf,ggml,type}.go and fs/gguf/gguf.go, fb30760; llama.cpp gguf.cpp for refusals.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from corral.wire.errors import CorralError

#: (offset, count) -> at most count bytes from there; fewer only at the end.
ReadAt = Callable[[int, int], bytes]

MAX_KEY_VALUES = MAX_TENSORS = 65_536
MAX_KEY_BYTES = 64 << 10
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ITEMS = 64 << 20
MAX_DIMENSIONS = 4
#: For the whole header: text that is kept, array items that are kept, strings that are stepped over (some 130 ns each).
MAX_KEPT_BYTES = 32 << 20
MAX_KEPT_ITEMS = 256 << 10
MAX_SKIPPED_STRINGS = 2 << 20
#: Arrays up to this length are kept: one number per layer, languages, tags.
MAX_KEPT_ARRAY = 256

DEFAULT_ALIGNMENT = 32
UNKNOWN_QUANTIZATION = "unknown"

_MAGIC = b"GGUF"
_WINDOW = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS: Mapping[int, struct.Struct] = {
    kind: struct.Struct("<" + code) for kind, code in {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}.items()
}
_KIND_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")

#: Tensor type id -> (name, values per block, bytes per block). Ids that ggml has retired are absent, so they are refused.
TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

#: `general.file_type` -> the quantization as Ollama prints it. Gaps are types that no file carries any more.
_FILE_TYPES: Mapping[int, str] = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M"), start=7)),
    **dict(enumerate(("Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S"), start=16)),
    **dict(enumerate(("IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16"), start=25)),
    **dict(enumerate(("TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0"), start=36)),
}


@dataclass(frozen=True, slots=True)
class ArrayMark:
    """Stands for an array that was stepped over. kind: of its items, `string`, `f32` …"""

    kind: str
    length: int


Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | ArrayMark


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table. offset: from the start of the data. shape: innermost dimension first."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says about itself.

    metadata: in file order; short arrays as tuples, long ones as `ArrayMark`. parameter_count: the sum of all tensors' elements.
    data_start: where the tensors' bytes begin. tensors: in file order.
    """

    version: int
    metadata: Mapping[str, Value] = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    parameter_count: int
    alignment: int
    data_start: int

    @property
    def architecture(self) -> str:
        """`general.architecture`, or `unknown`."""
        return self.text("general.architecture") or "unknown"

    @property
    def kind(self) -> str:
        """`general.type`: `model`, `adapter`, `mmproj` …; empty where the file does not say."""
        return self.text("general.type")

    @property
    def file_type(self) -> int | None:
        """`general.file_type`, or None."""
        return self.count("general.file_type")

    @property
    def quantization(self) -> str:
        """As listings print it: `Q4_K_M`, `F16`, or `unknown`."""
        return _FILE_TYPES.get(-1 if self.file_type is None else self.file_type, UNKNOWN_QUANTIZATION)

    @property
    def chat_template(self) -> str:
        """The Jinja template, or nothing."""
        return self.text("tokenizer.chat_template")

    @property
    def is_projector(self) -> bool:
        """Whether this is the image or sound encoder of another model. Source: ollama server/create.go isProjectorGGUF."""
        if self.kind in ("projector", "mmproj"):
            return True
        if self.own_count("block_count"):
            return False
        has_encoder = self.own("has_vision_encoder") is True or self.own("has_audio_encoder") is True
        return bool(self.own_count("vision.block_count")) or (self.architecture == "clip" and has_encoder)

    def own(self, name: str) -> Value | None:
        """The value of `<architecture>.<name>`, or None."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def own_count(self, name: str) -> int | None:
        """`<architecture>.<name>` if it is a whole number that is not negative."""
        return self.count(f"{self.architecture}.{name}")

    def count(self, key: str) -> int | None:
        """The value if it is a whole number that is not negative."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def text(self, key: str) -> str:
        """The value if it is text, or nothing."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""


def format_parameters(count: int) -> str:
    """A number of parameters as listings print it: `134.52M`, `8B`, `7.2B`. Source: ollama format/format.go HumanNumber."""
    for unit, letter, decimals in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= unit:
            return f"{count // unit}{letter}" if count % unit == 0 else f"{count / unit:.{decimals}f}{letter}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def read_header(read_at: ReadAt, file_size: int) -> GgufHeader:
    """Read and check the header of a file of that many bytes. Raises: bad_request with what is wrong with it."""
    cursor = _Cursor(read_at, file_size)
    version = _read_version(cursor)
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    if tensor_count > MAX_TENSORS or pair_count > MAX_KEY_VALUES:
        _refuse(f"it claims {pair_count} key/values and {tensor_count} tensors; at most {MAX_TENSORS} of each are read")
    metadata = _read_metadata(cursor, pair_count)
    alignment = _alignment_of(metadata)
    tensors = _read_tensors(cursor, tensor_count)
    data_start = -(-cursor.position // alignment) * alignment
    _check_placement(tensors, alignment, available=file_size - data_start)
    header = GgufHeader(
        version=version,
        metadata=metadata,
        tensors=tuple(tensors),
        parameter_count=sum(_elements(tensor.shape) for tensor in tensors),
        alignment=alignment,
        data_start=data_start,
    )
    _check_divisors(header)
    return header


def facts_of(header: GgufHeader, file_size: int) -> dict[str, object]:
    """What the header tells, as a JSON object with members named as storage.models.WeightFacts has them. Arrays that were stepped
    over are null, and so are numbers that JSON cannot write."""
    return {
        "size_bytes": file_size,
        "architecture": header.architecture,
        "kind": header.kind,
        "quantization": header.quantization,
        "parameter_count": header.parameter_count,
        "is_projector": header.is_projector,
        "metadata": {key: _json_value(value) for key, value in header.metadata.items()},
        "tensors": [{"name": tensor.name, "type": tensor.type, "shape": tensor.shape} for tensor in header.tensors],
    }


def _json_value(value: Value) -> object:
    match value:
        case ArrayMark():
            return None
        case tuple():
            return [_json_value(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


class _Cursor:
    """Walks the source from front to back through one window of it."""

    __slots__ = ("_at", "_kept_bytes", "_kept_items", "_read_at", "_size", "_skipped", "_start", "_window")

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at, self._size = read_at, size
        self._window, self._start, self._at = b"", 0, 0
        self._kept_bytes = self._kept_items = self._skipped = 0

    @property
    def position(self) -> int:
        """Bytes from the start of the file."""
        return self._start + self._at

    @property
    def remaining(self) -> int:
        """Bytes behind the position; never negative."""
        return self._size - self.position

    def need(self, count: int) -> None:
        """Have the next count bytes in the window."""
        if self._at + count <= len(self._window):
            return
        if count > self.remaining:
            _refuse("it is cut short")
        self._start, self._at = self.position, 0
        self._window = self._read_at(self._start, min(max(count, _WINDOW), self._size - self._start))
        if len(self._window) < count:
            _refuse("it is cut short")

    def skip(self, count: int) -> None:
        """Step over count bytes, read or not; no more than remain."""
        self._at += count

    def take(self, form: struct.Struct) -> Scalar:
        """One number."""
        self.need(form.size)
        (value,) = form.unpack_from(self._window, self._at)
        self._at += form.size
        return value  # type: ignore[no-any-return]

    def u32(self) -> int:
        return int(self.take(_U32))

    def u64(self) -> int:
        return int(self.take(_U64))

    def raw_string(self, limit: int) -> bytes:
        """A length and so many bytes, counted against what the header may make us keep."""
        length = self.u64()
        if length > limit:
            _refuse(f"it holds a text of {length} bytes; at most {limit} are read there")
        self._kept_bytes += length
        if self._kept_bytes > MAX_KEPT_BYTES:
            _refuse(f"its header holds more than {MAX_KEPT_BYTES} bytes of text")
        self.need(length)
        text = self._window[self._at : self._at + length]
        self._at += length
        return text

    def may_keep(self, items: int) -> bool:
        """Whether an array of that length is worth keeping; if so, it is counted."""
        if items > MAX_KEPT_ARRAY or self._kept_items + items > MAX_KEPT_ITEMS:
            return False
        self._kept_items += items
        return True

    def skip_strings(self, count: int) -> None:
        """Step over count strings. The loop is the cost of reading a header, so it works on locals."""
        self._skipped += count
        if self._skipped > MAX_SKIPPED_STRINGS:
            _refuse(f"its header holds more than {MAX_SKIPPED_STRINGS} strings")
        unpack, window, at, last = _U64.unpack_from, self._window, self._at, len(self._window) - 8
        for _ in range(count):
            if at > last:
                window, at = self._window_at(at)
                last = len(window) - 8
            length = unpack(window, at)[0]
            if length > MAX_STRING_BYTES:
                _refuse(f"it holds a text of {length} bytes; at most {MAX_STRING_BYTES} are read there")
            at += length + 8
        self._at = at
        if self.remaining < 0:
            _refuse("it is cut short")

    def _window_at(self, at: int) -> tuple[bytes, int]:
        """Move the window so that a length can be read at `at`, which may lie behind it; window and new index."""
        self._at = at
        self.need(8)
        return self._window, self._at


def _refuse(reason: str) -> NoReturn:
    raise CorralError("bad_request", f"not a usable GGUF file: {reason}")


def _read_version(cursor: _Cursor) -> int:
    if cursor.remaining < 8:
        _refuse("it is too short")
    cursor.need(8)
    if _U32.pack(cursor.u32()) != _MAGIC:
        _refuse("it does not begin with GGUF")
    version = cursor.u32()
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0:
        _refuse("its numbers are big-endian, which is not supported")
    _refuse(f"version {version} is not supported; versions 2 and 3 are")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = _utf8(cursor.raw_string(MAX_KEY_BYTES))
        # Two readers that disagree on which of two values counts is how checks are walked around; llama.cpp refuses it as well.
        if key in metadata:
            _refuse(f"the key {key[:80]!r} occurs twice")
        metadata[key] = _read_value(cursor, cursor.u32())
    return metadata


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        _refuse("a key or a tensor's name is not UTF-8")


def _read_value(cursor: _Cursor, kind: int) -> Value:
    if kind == _ARRAY:
        return _read_array(cursor)
    return _read_scalar(cursor, kind)


def _read_scalar(cursor: _Cursor, kind: int) -> Scalar:
    if kind == _STRING:
        return cursor.raw_string(MAX_STRING_BYTES).decode(errors="replace")
    form = _SCALARS.get(kind)
    if form is None:
        _refuse(f"it uses the unknown value type {kind}")
    value = cursor.take(form)
    return _shortest_float32(float(value)) if kind == _FLOAT32 else value


def _shortest_float32(value: float) -> float:
    """The double that prints as the single-precision number does: 1e-05, not 9.999999747378752e-06. Go's JSON does the same."""
    for digits in (6, 7, 8):
        candidate = float(f"{value:.{digits}g}")
        # inf comes back as inf; struct would refuse a candidate that rounds beyond the largest single.
        if abs(candidate) <= 3.4e38 and struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value


def _read_array(cursor: _Cursor) -> Value:
    kind, length = cursor.u32(), cursor.u64()
    if kind == _ARRAY:
        _refuse("it holds an array of arrays")
    if kind != _STRING and kind not in _SCALARS:
        _refuse(f"it uses the unknown value type {kind}")
    # A string takes at least its length field, so this also bounds how often the loops below run.
    item_size = 8 if kind == _STRING else _SCALARS[kind].size
    if length > MAX_ARRAY_ITEMS or length * item_size > cursor.remaining:
        _refuse(f"it claims an array of {length} items, more than it can hold")
    if cursor.may_keep(length):
        return tuple(_read_scalar(cursor, kind) for _ in range(length))
    if kind == _STRING:
        cursor.skip_strings(length)
    else:
        cursor.skip(length * item_size)
    return ArrayMark(_KIND_NAMES[kind], length)


def _alignment_of(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_number = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_number or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        _refuse("its alignment is not a power of two between 8 and 4096")
    return int(alignment)


def _read_tensors(cursor: _Cursor, count: int) -> list[Tensor]:
    tensors: dict[str, Tensor] = {}
    for _ in range(count):
        tensor = _read_tensor(cursor)
        if tensor.name in tensors:
            _refuse(f"the tensor {tensor.name[:80]!r} occurs twice")
        tensors[tensor.name] = tensor
    return list(tensors.values())


def _read_tensor(cursor: _Cursor) -> Tensor:
    name = _utf8(cursor.raw_string(MAX_KEY_BYTES))
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        _refuse(f"the tensor {name[:80]!r} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are read")
    shape = tuple(cursor.u64() for _ in range(dimensions))
    kind, offset = cursor.u32(), cursor.u64()
    if kind not in TENSOR_TYPES:
        _refuse(f"the tensor {name[:80]!r} has the unknown type {kind}")
    type_name, block_values, block_bytes = TENSOR_TYPES[kind]
    if (shape[0] if shape else 1) % block_values:
        _refuse(f"the rows of the tensor {name[:80]!r} do not fill whole blocks of {type_name}")
    return Tensor(name, type_name, shape, offset, _elements(shape) // block_values * block_bytes)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _check_placement(tensors: list[Tensor], alignment: int, *, available: int) -> None:
    """Every tensor lies inside the file: what lies outside would be read from somebody else's memory (CVE-2026-7482)."""
    for tensor in tensors:
        if tensor.offset % alignment:
            _refuse(f"the tensor {tensor.name[:80]!r} is not aligned")
        if tensor.offset + tensor.size_bytes > available:
            _refuse(f"it is cut short: the tensor {tensor.name[:80]!r} ends behind the end of the file")


def _check_divisors(header: GgufHeader) -> None:
    """Engines divide by these. A recurrent model says that it has no attention heads, and is left alone."""
    keys = ["embedding_length", "block_count"]
    is_recurrent = any(key.startswith((f"{header.architecture}.ssm.", f"{header.architecture}.wkv.")) for key in header.metadata)
    if not is_recurrent:
        keys.append("attention.head_count")
    for key in keys:
        if header.own_count(key) == 0:
            _refuse(f"{header.architecture}.{key} is zero")
