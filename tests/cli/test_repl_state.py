"""The conversation as a value: what requests say, what commands change, what is saved."""

from typing import Any

import pytest

from corral.cli.repl_state import ModelFacts, Session, is_cloud, parameter_value, parse_think, words_of
from corral.wire.errors import CorralError

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["temperature", "0.5"], 0.5),
        (["top_k", "40"], 40),
        (["num_gpu", "-1"], -1),
        (["use_mmap", "false"], False),
        (["stop", "a"], ["a"]),
        (["stop", "a", "b c"], ["a", "b c"]),
    ],
)
def test_parameter_gets_the_type_of_its_option(words: list[str], value: Any) -> None:
    got = parameter_value(words[0], words[1:])
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["foo", "1"], "unknown parameter 'foo'"),
        (["temperature", "warm"], "invalid float value [warm]"),
        (["temperature", "abc", "def"], "invalid float value [abc def]"),
        (["temperature", "1", "2"], "invalid float value [1 2]"),
        (["num_ctx", "4.5"], "invalid int value [4.5]"),
        (["use_mmap", "maybe"], "invalid bool value [maybe]"),
        (["num_ctx", "99999999999"], 'option "num_ctx" must be between -2147483648 and 2147483647'),
    ],
)
def test_parameter_of_another_type_is_refused_with_its_text(words: list[str], text: str) -> None:
    with pytest.raises(CorralError) as refused:
        parameter_value(words[0], words[1:])
    assert refused.value.message == text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("stop a b", ["stop", "a", "b"]),
        ('stop "### User:" "\\n"', ["stop", "### User:", "\n"]),
        ('stop "say \\"hi\\""', ["stop", 'say "hi"']),
        ('stop "open', ["stop", '"open']),
        ('stop "a"b', ["stop", '"a"b']),
        ('stop "\\q"', ["stop", '"\\q"']),
    ],
)
def test_words_in_quotes_are_one(line: str, words: list[str]) -> None:
    assert words_of(line) == words


def test_request_says_only_what_was_chosen() -> None:
    assert Session(model="m").request(prompt="") == {"model": "m", "prompt": ""}
    session = Session(model="m", format="json", keep_alive=-1.0, options={"seed": 1})
    assert session.request() == {"model": "m", "format": "json", "keep_alive": -1.0, "options": {"seed": 1}}


@pytest.mark.parametrize(
    ("chosen", "is_chosen", "capabilities", "sent"),
    [
        (None, False, {"completion"}, None),
        (None, False, {"thinking"}, True),
        (False, True, {"thinking"}, False),
        ("high", True, {"completion"}, "high"),
    ],
)
def test_model_that_can_think_does_unless_somebody_chose(chosen: Any, is_chosen: bool, capabilities: set[str], sent: Any) -> None:
    facts = ModelFacts(capabilities=frozenset(capabilities))
    assert Session(model="m", facts=facts, think=chosen, is_think_chosen=is_chosen).thinks == sent


def test_system_message_replaces_one_that_nothing_was_said_to() -> None:
    session = Session(model="m").with_system("one").with_system("two")
    assert session.messages == ({"role": "system", "content": "two"},)
    session = session.with_answer(HI, HELLO).with_system("three")
    assert [message["content"] for message in session.messages] == ["two", "hi", "Hello", "three"]
    assert session.system == "three"


def test_empty_system_message_takes_them_all_away() -> None:
    session = Session(model="m").with_system("one").with_answer(HI, HELLO).with_system("two").with_system("")
    assert (session.system, session.messages) == ("", (HI, HELLO))


def test_cleared_session_keeps_its_system_message_and_its_options() -> None:
    session = Session(model="m", options={"seed": 1}).with_answer(HI, HELLO).with_system("Be brief.").cleared()
    assert session.messages == ({"role": "system", "content": "Be brief."},)
    assert session.options == {"seed": 1}


def test_other_model_begins_anew_and_keeps_the_modes() -> None:
    facts = ModelFacts(capabilities=frozenset({"vision"}))
    session = (
        Session(model="m", is_verbose=True, options={"seed": 1}).with_system("s").with_answer(HI, HELLO).with_model("n", facts)
    )
    assert session == Session(model="n", facts=facts, is_verbose=True, options={"seed": 1})


def test_saved_session_is_made_of_what_was_stored_and_said() -> None:
    facts = ModelFacts(parent="base:1b", messages=({"role": "user", "content": "before"},))
    session = Session(model="m", facts=facts, options={"seed": 1}).with_system("Be brief.").with_answer(HI, HELLO)
    assert session.recipe("mine") == {
        "model": "mine",
        "from": "base:1b",
        "system": "Be brief.",
        "parameters": {"seed": 1},
        "messages": [{"role": "user", "content": "before"}, HI, HELLO],
    }
    assert Session(model="m").recipe("mine") == {"model": "mine", "from": "m"}


@pytest.mark.parametrize(
    ("model", "parent", "source"),
    [
        ("m", "", "m"),
        ("m", "base:1b", "base:1b"),
        ("m", "not a name", "m"),
        ("m:cloud", "m:1b", "m:cloud"),
        ("m:cloud", "m:1b-cloud", "m:1b-cloud"),
    ],
)
def test_saved_session_goes_back_to_the_model_it_came_from(model: str, parent: str, source: str) -> None:
    assert Session(model=model, facts=ModelFacts(parent=parent)).source == source


@pytest.mark.parametrize(
    ("details", "takes"),
    [
        ({}, False),
        ({"capabilities": ["completion"], "model_info": {"llama.context_length": 1}}, False),
        ({"capabilities": ["vision"]}, True),
        ({"capabilities": ["audio"]}, True),
        ({"projector_info": {"general.architecture": "clip"}}, True),
        ({"model_info": {"gemma3.vision.block_count": 27}}, True),
    ],
)
def test_model_takes_files_when_it_sees_or_hears(details: dict[str, Any], takes: bool) -> None:
    assert ModelFacts.of(details).takes_media is takes


@pytest.mark.parametrize(("name", "is_it"), [("m:cloud", True), ("m:1b-cloud", True), ("m:1b", False), ("m:cloud:local", False)])
def test_cloud_models_are_told_by_their_names(name: str, is_it: bool) -> None:
    assert is_cloud(name) is is_it


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("max", "max"), ("hard", None), ("", None)])
def test_think_is_a_truth_or_a_level(text: str, value: object) -> None:
    assert parse_think(text) == value
