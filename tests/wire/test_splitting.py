"""Thoughts and calls in text that comes in pieces of any size."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.splitting import CallSplitter, ThinkingSplitter, partial_end

SIZES = (1, 2, 5, 1000)


def pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def thought(text: str, size: int = 1000, *, is_inside: bool = False) -> tuple[str, str]:
    splitter = ThinkingSplitter("<think>", "</think>", is_inside=is_inside)
    parts = [*(splitter.feed(piece) for piece in pieces(text, size)), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def called(text: str, size: int = 1000, *, tag: str = "<tool_call>", names: tuple[str, ...] = ("get", "get_weather")) -> Any:
    splitter = CallSplitter(tag, names)
    content, calls = "", []
    for piece in pieces(text, size):
        said, found = splitter.feed(piece)
        content += said
        calls += [(call["function"]["name"], call["function"]["arguments"]) for call in found]
    return content + splitter.finish(), calls


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("text", "thoughts", "content"),
    [
        ("<think>a</think>b", "a", "b"),
        (" \n<think>\n a \n</think>\n\n b ", "a \n", "b "),
        ("<think></think>b", "", "b"),
        ("<think>a < </thin </think>b</think>c", "a < </thin ", "b</think>c"),
        (" plain <think>x</think>", "", " plain <think>x</think>"),
        ("<thi", "", "<thi"),
        ("<think>never ends</thi", "never ends</thi", ""),
        ("", "", ""),
        (" \n", "", " \n"),
        ("<think>a</think> \n", "a", ""),
    ],
)
def test_thoughts_are_what_stands_between_the_first_tags(text: str, thoughts: str, content: str, size: int) -> None:
    assert thought(text, size) == (thoughts, content)


@pytest.mark.parametrize("size", SIZES)
def test_thoughts_that_the_prompt_opened_need_no_tag(size: int) -> None:
    assert thought("\n a</think>\nb", size, is_inside=True) == ("a", "b")


@given(st.text("<think>/ \na", max_size=60), st.integers(1, 9))
def test_pieces_of_thoughts_make_no_difference(text: str, size: int) -> None:
    assert thought(text, size) == thought(text)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('x<tool_call>{"name": "get", "arguments": {"a": {"b": [1]}}}</tool_call>', "x", [("get", {"a": {"b": [1]}})]),
        ('<tool_call>{"name":"get","parameters":{}}</tool_call>\n<tool_call>{"name":"get_weather","arguments":{}}', "",
         [("get", {}), ("get_weather", {})]),
        ('<tool_call>{"name": "get", "arguments": "{\\"a\\": \\"}\\"}"}', "", [("get", {"a": "}"})]),
        ('<tool_call>[{"name":"get","arguments":{"a":1}},{"name":"get","arguments":{"a":2}}]', "",
         [("get", {"a": 1}), ("get", {"a": 2})]),
        ('<tool_call>{"tool_calls":[{"function":{"name":"get","arguments":{}}}]}', "", [("get", {})]),
        ('<tool_call>{"get_weather": {"city": "x"}}', "", [("get_weather", {"city": "x"})]),
        ('<tool_call>get_weather[ARGS]{"city": "x", "name": "y"}', "", [("get_weather", {"city": "x", "name": "y"})]),
        ('<tool_call>{"name": "get"}', "", [("get", {})]),
        ('<tool_call>{"name": "other", "arguments": {}}', '<tool_call>{"name": "other", "arguments": {}}', []),
        ('<tool_call>{not json} {"name": "get", "arguments": {}}', "", [("get", {})]),
        ('<tool_call>{"name": "get", "arguments": {', '<tool_call>{"name": "get", "arguments": {', []),
        ("a <tool_ b", "a <tool_ b", []),
        ("a <tool_", "a <tool_", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_calls_behind_a_tag_are_found(text: str, content: str, calls: list[Any], size: int) -> None:
    assert called(text, size) == (content, calls)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("tag", "text", "content", "calls"),
    [
        ("{", ' {"name": "get", "arguments": {"a": 1}}', " ", [("get", {"a": 1})]),
        ("{", '{"answer": 42} is it', '{"answer": 42} is it', []),
        ("{", 'It is {"name": "get", "arguments": {}}', 'It is {"name": "get", "arguments": {}}', []),
        ("[", '[{"name": "get", "arguments": {}}, {"name": "get", "arguments": {"b": 1}}]', "", [("get", {}), ("get", {"b": 1})]),
        ("[", "[1, [2]] and more", "[1, [2]] and more", []),
        ("{", '{"name": "get"', '{"name": "get"', []),
        ("[TOOL_CALLS] [", '[TOOL_CALLS] [{"name": "get", "arguments": {"a": "]"}}]', "", [("get", {"a": "]"})]),
    ],
)
def test_calls_without_a_tag_are_the_whole_answer(tag: str, text: str, content: str, calls: list[Any], size: int) -> None:
    assert called(text, size, tag=tag) == (content, calls)


def test_call_that_never_ends_is_given_up() -> None:
    splitter = CallSplitter("<call>", ["get"])
    splitter.feed("<call>")
    fed = sum(len(splitter.feed("x" * 100_000)[0]) for _ in range(60))
    assert fed == 6_000_000 + len("<call>")


def test_t107_call_of_many_braces_takes_linear_time() -> None:
    assert called("<tool_call>" + "{" * 100_000, 1000) == ("<tool_call>" + "{" * 100_000, [])
    assert called('<tool_call>{"name": "get", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001, 100)[1] == []


@pytest.mark.parametrize(("levels", "count"), [(31, 1), (32, 0), (500, 0)])
def test_t106_call_is_as_deep_on_every_python(levels: int, count: int) -> None:
    assert len(called('<tool_call>{"name": "get", "arguments": ' + '{"a":' * levels + "1" + "}" * (levels + 1), 100)[1]) == count


@given(st.text('<tool_cal>{}[]":,namegt\\ ', max_size=60), st.integers(1, 9))
def test_text_without_calls_is_kept_whatever_the_pieces(text: str, size: int) -> None:
    content, calls = called(text, size)
    assert calls or content == text
    assert (content, calls) == called(text)


@pytest.mark.parametrize(
    ("text", "tag", "count"), [("a<", "<t>", 1), ("a<t", "<t>", 2), ("<t>", "<t>", 0), ("a", "<t>", 0), ("", "<t>", 0)]
)
def test_partial_tags_at_the_end(text: str, tag: str, count: int) -> None:
    assert partial_end(text, tag) == count
