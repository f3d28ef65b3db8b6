"""What can be told of a model from the text of its chat template, without running it.

Two languages: the Go template of a Modelfile and the Jinja template inside a GGUF file. Source: ollama server/images.go
(chatTemplateHas…, goTemplateCapabilities), thinking/template.go InferTags, template/template.go Vars, fb30760.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from corral.wire.errors import CorralError
from corral.wire.goprompt import GoPrompt, go_prompt

#: What may hold words that are no fields: strings and comments. Unclosed ones end the text, which keeps the search linear.
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*(?:"|\Z)|`[^`]*(?:`|\Z)|/\*.*?(?:\*/|\Z)', re.DOTALL)
_FIELD = re.compile(r"\.(\w+)")
#: A chain that begins with the dot: `.Thinking`, but neither `$.Thinking` nor `.Message.Thinking`.
_OWN_FIELD = re.compile(r"(?<![\w$.)])\.(\w+)")
_KEYWORD = re.compile(r"\w*")
_OPENERS = frozenset({"if", "range", "with", "define", "block"})


def jinja_has_tools(template: str) -> bool:
    """Whether a Jinja chat template renders tools."""
    return "tools" in template or "tool_call" in template


def jinja_has_thinking(template: str) -> bool:
    """Whether a Jinja chat template knows of thinking."""
    if "<think>" in template and "</think>" in template:
        return True
    # Some templates only cut earlier thoughts away; the engine still tells thought from answer then.
    splits = "content.split('</think>')" in template or 'content.split("</think>")' in template
    return splits and "reasoning_content" not in template and "<SPECIAL_12>" not in template


def jinja_is_preferred(chat_template: str, template: str) -> bool:
    """Whether the Jinja template inside the weights serves better than the model's Go template: when more can be done with it, or
    the same, but only it shows the model what tools answered. A Go template that cannot be read serves nobody."""
    try:
        go = go_prompt(template)
    except CorralError:
        return True
    found = {"tools": jinja_has_tools(chat_template), "thinking": jinja_has_thinking(chat_template)}
    jinja_can = {name for name, is_found in found.items() if is_found}
    go_can = {name for name in ("tools", "suffix") if name in go.fields} | ({"thinking"} if all(go.thinking_tags) else set())
    if len(jinja_can) > len(go_can):
        return not _go_shows_results(go, template) or _jinja_shows_results(chat_template)
    if jinja_can != go_can or "tools" not in go_can:
        return False
    return _jinja_shows_results(chat_template) and not _go_shows_results(go, template)


def _go_shows_results(go: GoPrompt, template: str) -> bool:
    marks = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
    return go.fields >= {"tools", "toolcalls"} and any(mark in template for mark in marks)


_ROLE_IS_TOOL = re.compile(r"""role(?:'\]|"\]) == (?:'tool'|"tool")|message\.role == (?:'tool'|"tool")""")


def _jinja_shows_results(chat_template: str) -> bool:
    has_calls = "tool_calls" in chat_template or "assistant_tool_call" in chat_template
    marks = ("tool_response", "tool_results", "ipython")
    shows = any(mark in chat_template for mark in marks) or _ROLE_IS_TOOL.search(chat_template) is not None
    return has_calls and shows


def go_fields(template: str) -> frozenset[str]:
    """The names of all fields a Go template uses, in lower case."""
    return frozenset(name.lower() for _, action in _pieces(template) for name in _FIELD.findall(action))


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """(text, the action behind it) with trim marks applied; actions without their strings and comments, the last one empty."""
    at, trims = 0, False
    while True:
        start = template.find("{{", at)
        end = template.find("}}", start) if start >= 0 else -1
        if end < 0:
            yield _trimmed(template[at:], left=trims, right=False), ""
            return
        action = template[start + 2 : end]
        text = _trimmed(template[at:start], left=trims, right=action[:1] == "-" and action[1:2].isspace())
        yield text, _QUOTED.sub('""', action).strip("- \t\r\n")
        at, trims = end + 2, action[-1:] == "-" and action[-2:-1].isspace()


def _trimmed(text: str, *, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


@dataclass(slots=True)
class _Block:
    """What stands between keywords. nodes: text as it is, actions as None. in_messages: the inmost range is over .Messages."""

    in_messages: bool
    nodes: list[str | None] = field(default_factory=list)
    has_thinking: bool = False


def go_has_thinking(template: str) -> bool:
    """Whether a Go template wraps `.Thinking` in tags while it walks the messages: the first and the last text around it."""
    return any(block.has_thinking and _is_tagged(block) for block in _blocks(template))


def _is_tagged(block: _Block) -> bool:
    first, last = block.nodes[0], block.nodes[-1]
    return first is not None and last is not None and bool(first.strip()) and bool(last.strip())


def _blocks(template: str) -> list[_Block]:
    """All blocks of a template, in order of their beginnings. Malformed nesting is taken as it comes."""
    root = _Block(in_messages=False)
    open_blocks, every = [root], [root]
    for text, action in _pieces(template):
        if text:
            open_blocks[-1].nodes.append(text)
        keyword = _KEYWORD.match(action)[0]  # type: ignore[index]  # the pattern matches anything
        if keyword in ("end", "else") and len(open_blocks) > 1:
            open_blocks.pop()
        if keyword not in ("end", "else"):
            _add_action(open_blocks[-1], action)
        if keyword == "else" or keyword in _OPENERS:
            inner = _Block(in_messages=_walks_messages(keyword, action, open_blocks[-1]))
            open_blocks.append(inner)
            every.append(inner)
    return [block for block in every if block.nodes]


def _add_action(block: _Block, action: str) -> None:
    if not action or action == '""':
        return  # a comment leaves nothing in the tree
    block.nodes.append(None)
    block.has_thinking |= block.in_messages and "Thinking" in _OWN_FIELD.findall(action)


def _walks_messages(keyword: str, action: str, outer: _Block) -> bool:
    return "Messages" in _FIELD.findall(action) if keyword == "range" else outer.in_messages
