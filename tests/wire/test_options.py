"""Options, keep_alive, think and format: Ollama's table, precedence and texts, and that nothing else reaches an engine."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.options import (
    FOREVER,
    LOAD_OPTIONS,
    completion_schema,
    format_duration,
    merge_options,
    parse_keep_alive,
    parse_think,
    response_format,
    template_kwargs,
)

DEFAULTS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": -1,
    "stop": [],
    "n_predict": -1,
    "n_keep": 4,
}


def test_options_unset_are_ollamas_defaults() -> None:
    merged = merge_options({}, {})
    assert merged.sampling == DEFAULTS
    assert merged.load == {}


def test_options_request_wins_over_the_models_parameters() -> None:
    merged = merge_options(
        {"temperature": 0.1, "top_k": 5, "stop": ["a", "b"], "num_ctx": 8192}, {"temperature": 2, "num_ctx": 512.0}
    )
    assert merged.sampling == DEFAULTS | {"temperature": 2.0, "top_k": 5, "stop": ["a", "b"]}
    assert merged.load == {"num_ctx": 512}


def test_options_null_leaves_what_was_set_before() -> None:
    assert merge_options({"top_k": 5}, {"top_k": None}).sampling["top_k"] == 5


def test_options_accept_integers_written_as_floats_and_the_reverse() -> None:
    sampling = merge_options({}, {"num_predict": 12.7, "temperature": 1}).sampling
    assert sampling["n_predict"] == 12
    assert sampling["temperature"] == 1.0
    assert isinstance(sampling["n_predict"], int)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_ctx": "x"}, 'option "num_ctx" must be of type integer'),
        ({"top_k": True}, 'option "top_k" must be of type integer'),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"stop": "a"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
        ({"seed": []}, 'option "seed" must be of type integer'),
    ],
)
def test_options_of_a_wrong_type_answer_ollamas_text_and_status(options: dict[str, Any], text: str) -> None:
    with pytest.raises(CorralError) as caught:
        merge_options({}, options)
    assert (caught.value.message, caught.value.status) == (text, 500)


@pytest.mark.parametrize(
    "options",
    [
        {"num_ctx": 1e12},
        {"num_ctx": 10**400},
        {"num_ctx": float("inf")},
        {"num_ctx": float("nan")},
        {"num_thread": -(2**31) - 1},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"seed": 2**64},
    ],
)
def test_t096_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CorralError) as caught:
        merge_options({}, options)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["n_discard", "--log-file", "log-file=/x", "n_predict", "grammar", "prompt", "$(id)", "a\nb"])
def test_t096_options_ollama_does_not_know_reach_no_engine(name: str) -> None:
    merged = merge_options({name: -1}, {name: "/x"})
    assert merged.sampling == DEFAULTS
    assert merged.load == {}


@given(
    st.dictionaries(
        st.one_of(st.sampled_from([*DEFAULTS, *LOAD_OPTIONS, "num_predict", "num_keep"]), st.text(max_size=5)),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.text(max_size=3), max_size=2)
        ),
    )
)
def test_options_of_any_kind_give_known_names_or_a_coded_error(options: dict[str, Any]) -> None:
    try:
        merged = merge_options({}, options)
    except CorralError:
        return
    assert merged.sampling.keys() == DEFAULTS.keys()
    assert merged.load.keys() <= LOAD_OPTIONS - {"draft_num_predict"}


@pytest.mark.parametrize(("seed", "sent"), [(-1, -1), (7, 7), (2**32 + 7, 7), (-2, 2**32 - 2)])
def test_options_seed_is_cut_to_what_the_engine_keeps(seed: int, sent: int) -> None:
    assert merge_options({}, {"seed": seed}).sampling["seed"] == sent


@pytest.mark.parametrize(("wanted", "sent"), [(-1, 20480), (-2, 20480), (10**6, 20480), (20480, 20480), (5, 5), (0, 0)])
def test_options_num_predict_is_bounded_to_ten_contexts(wanted: int, sent: int) -> None:
    assert merge_options({}, {"num_predict": wanted}).bounded(2048)["n_predict"] == sent


def test_options_num_predict_stays_when_the_context_is_unknown() -> None:
    assert merge_options({}, {}).bounded(0)["n_predict"] == -1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0),
        (10, 10),
        (0.5, 0.5),
        (-1, FOREVER),
        (-0.1, FOREVER),
        ("0", 0),
        ("-0", 0),
        ("300ms", 0.3),
        ("1.5h", 5400),
        ("2h45m", 9900),
        ("5m0s", 300),
        ("1us1µs1μs", 3e-6),
        (".5s", 0.5),
        ("1.s", 1),
        ("+3s", 3),
        ("-1m", FOREVER),
        ("2562047h47m16.854775807s", 2**63 / 1e9),
    ],
)
def test_keep_alive_becomes_seconds(value: object, seconds: float | None) -> None:
    assert parse_keep_alive(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("10", 'time: missing unit in duration "10"'),
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        ("abc", 'time: invalid duration "abc"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        (".s", 'time: invalid duration ".s"'),
        ("1h5", 'time: missing unit in duration "1h5"'),
        ("9999999h", 'time: invalid duration "9999999h"'),
        (True, "Unsupported type: 'bool'"),
        ([], "Unsupported type: '[]interface {}'"),
        ({}, "Unsupported type: 'map[string]interface {}'"),
    ],
)
def test_keep_alive_refused_with_gos_text(value: object, text: str) -> None:
    with pytest.raises(CorralError) as caught:
        parse_keep_alive(value)
    assert (caught.value.message, caught.value.status) == (text, 400)


@pytest.mark.parametrize("value", [10**400, float("inf")])
def test_keep_alive_beyond_any_clock_is_bounded(value: float) -> None:
    assert parse_keep_alive(value) == pytest.approx(2**63 / 1e9)


@given(st.text(max_size=150))
def test_keep_alive_of_any_text_is_seconds_or_a_coded_error(text: str) -> None:
    with contextlib.suppress(CorralError):
        seconds = parse_keep_alive(text)
        assert seconds is not None
        assert seconds >= FOREVER


@pytest.mark.parametrize("value", [None, True, False, "low", "medium", "high", "max"])
def test_think_is_taken_as_it_is(value: object) -> None:
    assert parse_think(value) == value


def test_think_of_an_unknown_level_names_the_levels() -> None:
    with pytest.raises(CorralError) as caught:
        parse_think("x")
    assert caught.value.message == 'invalid think value: "x" (must be "high", "medium", "low", "max", true, or false)'


def test_think_of_another_type_is_refused() -> None:
    with pytest.raises(CorralError, match="think must be a boolean or string"):
        parse_think(1)


def test_template_hears_of_thinking_only_when_it_is_set() -> None:
    assert template_kwargs(None) == {}
    assert template_kwargs(False) == {"enable_thinking": False}
    assert template_kwargs(True) == {"enable_thinking": True}
    assert template_kwargs("low") == {"enable_thinking": True, "reasoning_effort": "low"}


@pytest.mark.parametrize("value", [None, ""])
def test_format_unset_is_none(value: object) -> None:
    assert response_format(value) is None
    assert completion_schema(value) is None


def test_format_json_and_schema_become_what_llama_cpp_takes() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert response_format("json") == {"type": "json_object"}
    assert response_format(schema) == {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
    assert completion_schema("json") == {"type": "object"}
    assert completion_schema(schema) == schema


@pytest.mark.parametrize(("value", "shown"), [("xml", r'"\"xml\""'), (True, '"true"'), ([], '"[]"')])
def test_format_of_another_kind_answers_ollamas_text_and_status(value: object, shown: str) -> None:
    with pytest.raises(CorralError) as caught:
        response_format(value)
    assert caught.value.message == f'invalid format: {shown}; expected "json" or a valid JSON Schema object'
    assert caught.value.status == 500


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (300, "5m0s"),
        (5400, "1h30m0s"),
        (1.5, "1.5s"),
        (0.3, "300ms"),
        (0.0015, "1.5ms"),
        (1e-6, "1µs"),
        (3e-9, "3ns"),
        (59.999, "59.999s"),
        (3600, "1h0m0s"),
        (-1, "2562047h47m16.854775807s"),
        (1e30, "2562047h47m16.854775807s"),
    ],
)
def test_duration_is_written_as_go_writes_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
