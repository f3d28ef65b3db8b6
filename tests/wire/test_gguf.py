"""Headers of GGUF files: what is read, and that whatever is wrong with one is a clear refusal, quickly and in little memory."""

import struct
import tracemalloc
from collections.abc import Mapping, Sequence
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire import gguf
from corral.wire.errors import CorralError
from corral.wire.gguf import ArrayMark, GgufHeader, format_parameters, read_header
from fakes_models import (
    ARRAY,
    F32,
    LLAMA,
    STRING,
    TENSOR_F32,
    U32,
    U64,
    WEIGHTS,
    GgufValue,
    Raw,
    gguf_bytes,
    gguf_string,
    pairs,
    tensor_row,
    u64,
)

WHOLE = gguf_bytes()


def header_of(content: bytes) -> GgufHeader:
    return read_header(lambda offset, count: content[offset : offset + count], len(content))


def with_(**changes: GgufValue) -> dict[str, GgufValue]:
    """The llama header with other values; `__` stands for a dot."""
    return {**LLAMA, **{key.replace("__", "."): value for key, value in changes.items()}}


def made_of(metadata: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0, data: bytes = b"") -> bytes:
    """A file whose parts do not have to fit together."""
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + metadata + tensors
    return head + b"\0" * (-len(head) % 32) + data


def refusal(content: bytes) -> str:
    with pytest.raises(CorralError) as caught:
        header_of(content)
    assert caught.value.code == "bad_request"
    return caught.value.message


# ── What is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_header_tells_what_listings_show() -> None:
    header = header_of(WHOLE)
    assert (header.architecture, header.quantization, header.parameter_count) == ("llama", "Q4_1", 32 * 4 + 32)
    assert (header.own_count("context_length"), header.own("embedding_length"), header.alignment) == (8192, 32, 32)
    assert [tensor.shape for tensor in header.tensors] == [(32, 4), (32,)]
    assert header.data_start + header.tensors[-1].offset + header.tensors[-1].size_bytes == len(WHOLE)


@pytest.mark.parametrize("version", [2, 3])
def test_header_of_both_versions_is_read(version: int) -> None:
    assert header_of(gguf_bytes(version=version)).version == version


def test_header_without_anything_is_read() -> None:
    header = header_of(made_of(b"", 0))
    assert (header.architecture, header.kind, header.chat_template, header.file_type) == ("unknown", "", "", None)
    assert header.quantization == "unknown"


def test_single_precision_prints_as_it_was_written() -> None:
    header = header_of(gguf_bytes(with_(a=1e-05, b=0.1, c=10000.0, d=3.4028234663852886e38)))
    assert [header.metadata[key] for key in "abc"] == [1e-05, 0.1, 10000.0]
    assert struct.pack("<f", header.metadata["d"]) == struct.pack("<f", 3.4028234663852886e38)


def test_single_precision_without_a_short_form_is_kept_exactly() -> None:
    value = struct.unpack("<f", struct.pack("<I", 0x7F7FFFFF))[0]
    assert header_of(gguf_bytes(with_(a=value))).metadata["a"] == value


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_numbers_do_no_harm(value: float) -> None:
    assert header_of(gguf_bytes(with_(a=value))).metadata["a"] == value


def test_short_arrays_are_kept_and_long_ones_marked() -> None:
    header = header_of(gguf_bytes(with_(short=[1, 2], words=["en"], empty=[], long=list(range(300)), vocabulary=["x"] * 300)))
    assert (header.metadata["short"], header.metadata["words"], header.metadata["empty"]) == ((1, 2), ("en",), ())
    assert header.metadata["long"] == ArrayMark("u32", 300)
    assert header.metadata["vocabulary"] == ArrayMark("string", 300)


def test_kept_arrays_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real bound takes 256 KiB items to reach.
    monkeypatch.setattr(gguf, "MAX_KEPT_ITEMS", 5)
    header = header_of(gguf_bytes({"a": [1, 2, 3], "b": [4, 5, 6]}))
    assert (header.metadata["a"], header.metadata["b"]) == ((1, 2, 3), ArrayMark("u32", 3))


def test_strings_that_are_not_utf8_are_mended() -> None:
    header = header_of(gguf_bytes(with_(a=Raw(STRING, gguf_string(b"\xffa")))))
    assert header.metadata["a"] == "\N{REPLACEMENT CHARACTER}a"


@pytest.mark.parametrize("window", [16, 64, 1 << 20])
def test_a_header_wider_than_the_window_is_read_the_same(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A real window is 1 MiB, and a test file that large would be slow.
    monkeypatch.setattr(gguf, "_WINDOW", window)
    header = header_of(gguf_bytes(with_(vocabulary=["x" * (index % 40) for index in range(500)], z=7)))
    assert (header.metadata["vocabulary"], header.metadata["z"]) == (ArrayMark("string", 500), 7)


def test_own_alignment_moves_the_data() -> None:
    header = header_of(gguf_bytes(with_(general__alignment=64), alignment=64))
    assert (header.alignment, header.data_start % 64) == (64, 0)


_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 7: "Q8_0", 15: "Q4_K_M", 18: "Q6_K", 32: "BF16", 4: "unknown", 41: "Q2_0"}


@pytest.mark.parametrize(("file_type", "name"), _FILE_TYPES.items())
def test_quantization_has_ollamas_name(file_type: int, name: str) -> None:
    assert header_of(gguf_bytes(with_(general__file_type=file_type))).quantization == name


@pytest.mark.parametrize("value", ["3", True, 1.5, Raw(5, struct.pack("<i", -1))])
def test_counts_of_another_kind_are_none(value: GgufValue) -> None:
    assert header_of(gguf_bytes(with_(general__file_type=value))).file_type is None


@pytest.mark.parametrize(
    ("metadata", "is_projector"),
    [
        (LLAMA, False),
        ({"general.type": "mmproj"}, True),
        ({"general.architecture": "clip", "clip.has_vision_encoder": True}, True),
        ({"general.architecture": "clip", "clip.has_audio_encoder": True, "clip.vision.block_count": 2}, True),
        ({"general.architecture": "clip"}, False),
        ({"general.architecture": "gemma3", "gemma3.block_count": 4, "gemma3.vision.block_count": 2}, False),
    ],
)
def test_encoders_of_other_models_are_told_apart(metadata: Mapping[str, GgufValue], is_projector: bool) -> None:
    assert header_of(gguf_bytes(metadata)).is_projector is is_projector


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (22_700, "23K"),
        (999_999, "1000K"),
        (1_000_000, "1M"),
        (134_515_008, "134.52M"),
        (7_000_000_000, "7B"),
        (8_030_261_312, "8.0B"),
        (70_553_706_496, "70.6B"),
    ],
)
def test_parameters_print_as_ollama_prints_them(count: int, text: str) -> None:
    assert format_parameters(count) == text


# ── What is refused (T105) ───────────────────────────────────────────────────────────────────────────────────────────


def test_t105_a_file_cut_at_any_byte_is_refused() -> None:
    for length in range(len(WHOLE)):
        assert refusal(WHOLE[:length])


def test_t105_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    with pytest.raises(CorralError, match="cut short"):
        read_header(lambda offset, count: WHOLE[:100][offset : offset + count], len(WHOLE))


HUGE = 2**63
CORPUS = {
    "not GGUF": (b"PK\x03\x04" + b"\0" * 60, "does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not supported"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 key/values": (made_of(b"", HUGE), "claims 9223372036854775808 key/values"),
    "2^63 tensors": (made_of(b"", 0, b"", HUGE), "9223372036854775808 tensors"),
    "65,537 tensors": (made_of(b"", 0, b"", 65_537), "65537 tensors"),
    "key of 2^63 bytes": (made_of(u64(HUGE), 1), "a text of 9223372036854775808 bytes"),
    "key of 65,537 bytes": (made_of(gguf_string("k" * 65_537) + b"\0" * 12, 1), "a text of 65537 bytes"),
    "key beyond the end": (made_of(u64(60_000), 1), "cut short"),
    "key that is not UTF-8": (gguf_bytes(tensors=()).replace(b"llama.context", b"llama\xffcontext"), "not UTF-8"),
    "key twice": (made_of(pairs({"a": 1}) * 2, 2), "'a' occurs twice"),
    "unknown value type": (made_of(pairs({"a": Raw(13, b"\0" * 8)}), 1), "unknown value type 13"),
    "string beyond the end": (made_of(pairs({"a": Raw(STRING, u64(1 << 20))}), 1), "cut short"),
    "string of 16 MiB + 1": (made_of(pairs({"a": Raw(STRING, u64((16 << 20) + 1))}), 1), "a text of 16777217 bytes"),
    "array of arrays": (made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", ARRAY, 1))}), 1), "array of arrays"),
    "array of unknown type": (made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", 99, 1))}), 1), "unknown value type 99"),
    "array of 2^63 numbers": (
        made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", U32, HUGE))}), 1),
        "array of 922337203685",
    ),
    "array of 2^61 strings": (made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", STRING, 2**61))}), 1), "claims an array"),
    "array beyond the end": (made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", U32, 1000))}), 1), "claims an array"),
    "strings beyond the end": (
        made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", STRING, 300) + u64(1 << 12) + b"\0" * 4000)}), 1),
        "cut short",
    ),
    "last string beyond the end": (
        made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", STRING, 300) + u64(0) * 299 + u64(1 << 12))}), 1),
        "cut short",
    ),
    "string of 2^63 bytes in an array": (
        made_of(pairs({"a": Raw(ARRAY, struct.pack("<IQ", STRING, 300) + u64(HUGE) + b"\0" * 4000)}), 1),
        "a text of 9223372036854775808 bytes",
    ),
    "alignment 0": (gguf_bytes(with_(general__alignment=0)), "alignment"),
    "alignment 4": (gguf_bytes(with_(general__alignment=4)), "alignment"),
    "alignment 48": (gguf_bytes(with_(general__alignment=48)), "alignment"),
    "alignment 8192": (gguf_bytes(with_(general__alignment=8192)), "alignment"),
    "alignment 2^63": (gguf_bytes(with_(general__alignment=Raw(U64, u64(HUGE)))), "alignment"),
    "alignment as text": (gguf_bytes(with_(general__alignment="32")), "alignment"),
    "alignment as truth": (gguf_bytes(with_(general__alignment=True)), "alignment"),
    "zero heads": (gguf_bytes(with_(llama__attention__head_count=0)), "head_count is zero"),
    "zero embedding length": (gguf_bytes(with_(llama__embedding_length=0)), "embedding_length is zero"),
    "zero blocks": (gguf_bytes(with_(llama__block_count=0)), "block_count is zero"),
    "five dimensions": (made_of(b"", 0, tensor_row("t", (1,) * 5, TENSOR_F32, 0), 1, b"\0" * 32), "5 dimensions"),
    "2^32-1 dimensions": (made_of(b"", 0, gguf_string("t") + b"\xff" * 4, 1, b"\0" * 64), "4294967295 dimensions"),
    "unknown tensor type": (made_of(b"", 0, tensor_row("t", (1,), 4, 0), 1, b"\0" * 32), "unknown type 4"),
    "rows that fill no block": (made_of(b"", 0, tensor_row("t", (31,), 3, 0), 1, b"\0" * 32), "whole blocks of Q4_1"),
    "tensor twice": (made_of(b"", 0, tensor_row("t", (1,), 0, 0) * 2, 2, b"\0" * 32), "'t' occurs twice"),
    "tensor's name is not UTF-8": (made_of(b"", 0, tensor_row(b"\xff", (1,), 0, 0), 1, b"\0" * 32), "not UTF-8"),
    "offset not aligned": (made_of(b"", 0, tensor_row("t", (1,), 0, 4), 1, b"\0" * 32), "not aligned"),
    "offset behind the end": (made_of(b"", 0, tensor_row("t", (1,), 0, 32), 1, b"\0" * 32), "behind the end"),
    "offset 2^64-32": (made_of(b"", 0, tensor_row("t", (1,), 0, 2**64 - 32), 1, b"\0" * 32), "behind the end"),
    "size that overflows": (made_of(b"", 0, tensor_row("t", (2**63, 2**63, 2**63, 8), 0, 0), 1, b"\0" * 32), "behind the end"),
    "size one byte too large": (made_of(b"", 0, tensor_row("t", (9,), 0, 0), 1, b"\0" * 35), "behind the end"),
}


@pytest.mark.parametrize("name", CORPUS)
def test_t105_a_malformed_file_is_refused_with_its_reason(name: str) -> None:
    content, reason = CORPUS[name]
    message = refusal(content)
    assert message.startswith("not a usable GGUF file: ")
    assert reason in message


def test_t105_zero_heads_of_a_recurrent_model_are_its_truth() -> None:
    metadata = {"general.architecture": "mamba", "mamba.attention.head_count": 0, "mamba.ssm.conv_kernel": 4}
    assert header_of(gguf_bytes(metadata)).own_count("attention.head_count") == 0


def test_t105_text_is_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real bound takes 32 MiB to reach.
    monkeypatch.setattr(gguf, "MAX_KEPT_BYTES", 100)
    assert "more than 100 bytes of text" in refusal(gguf_bytes({"a": "x" * 60, "b": "x" * 60}))


def test_t105_strings_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real bound takes 32 MiB to reach.
    monkeypatch.setattr(gguf, "MAX_SKIPPED_STRINGS", 500)
    assert "more than 500 strings" in refusal(gguf_bytes({"a": [""] * 300, "b": [""] * 300}))


def test_t105_the_costliest_header_takes_bounded_time() -> None:
    """As many strings to step over as may be, and then one array too many."""
    head = (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + gguf_string("a") + struct.pack("<IIQ", ARRAY, STRING, gguf.MAX_SKIPPED_STRINGS)
    )
    tail = pairs({"b": [""] * 300})
    end_of_strings = len(head) + 8 * gguf.MAX_SKIPPED_STRINGS

    def read_at(offset: int, count: int) -> bytes:
        # Zeros are strings without letters, so that the file of 32 MiB does not have to exist.
        if offset >= end_of_strings:
            return tail[offset - end_of_strings :][:count]
        return (head[offset:] + bytes(min(count, end_of_strings - max(offset, len(head)))))[:count]

    started = process_time()
    with pytest.raises(CorralError, match="strings"):
        read_header(read_at, end_of_strings + len(tail))
    assert process_time() - started < 5


def test_t105_the_largest_header_takes_bounded_memory() -> None:
    text = "\N{GRINNING FACE}" * (gguf.MAX_KEPT_BYTES // 8)
    content = made_of(pairs({"a": text, "b": text}), 2)
    tracemalloc.start()
    with pytest.raises(CorralError, match="bytes of text"):
        header_of(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 << 20


def outcome(content: bytes) -> GgufHeader | None:
    """The header; None when it is refused as it should be."""
    try:
        return header_of(content)
    except CorralError as error:
        code = error.code
    assert code == "bad_request"
    return None


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=12))
def test_t105_damage_anywhere_is_read_or_refused(position: int, damage: bytes) -> None:
    content = WHOLE[:position] + damage + WHOLE[position + len(damage) :]
    header = outcome(content)
    tensors = header.tensors if header else ()
    assert all(tensor.offset + tensor.size_bytes <= len(content) for tensor in tensors)


@given(st.binary(max_size=400))
def test_t105_any_bytes_behind_the_magic_are_read_or_refused(tail: bytes) -> None:
    outcome(b"GGUF\x03\0\0\0" + tail)


_NUMBERS = st.integers(0, 2**32 - 1)
_TEXTS = st.text("aé{\n\0", max_size=6)
_VALUES = st.one_of(st.booleans(), _NUMBERS, _TEXTS, st.lists(_NUMBERS, max_size=4), st.lists(_TEXTS, min_size=1, max_size=4))


@given(st.dictionaries(st.text("ab", min_size=1, max_size=4), _VALUES, max_size=6))
def test_what_was_written_is_read_back(metadata: dict[str, bool | int | str | Sequence[int] | Sequence[str]]) -> None:
    header = header_of(gguf_bytes(metadata))
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}
    assert dict(header.metadata) == expected
    assert len(header.tensors) == len(WEIGHTS)


def test_float_kind_is_single_precision() -> None:
    assert header_of(gguf_bytes({"a": Raw(F32, struct.pack("<f", 0.5))})).metadata["a"] == 0.5
