"""Prompts out of Go templates: what Ollama gives a model's TEMPLATE to work with, and what the template tells in return. Pure.

A template that names `.Messages` is run once over the whole chat. An older one knows one turn, `.System`, `.Prompt` and
`.Response`, and is run once per turn; of the last turn, what stands behind `.Response` is left out, for there the model goes on.
Source: ollama template/template.go, thinking/template.go, tools/template.go, api/types.go, fb30760.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from msgspec.structs import replace

from corral.wire.errors import CorralError
from corral.wire.gosyntax import parse
from corral.wire.gotemplate import Allowance, execute
from corral.wire.gotree import (
    Action,
    Branch,
    Call,
    Chain,
    Field,
    Jump,
    Node,
    Operand,
    Pipe,
    Template,
    Text,
    Variable,
)
from corral.wire.govalues import Ordered, Shown, Struct, shown, to_json
from corral.wire.native import Message
from corral.wire.options import Think

#: Of properties within properties of a tool.
_MAX_SCHEMA_DEPTH = 50
_RESPONSE = Action(Pipe(((Field(("Response",)),),), (), False, 0))
#: What calls begin with when a template does not say.
ANY_OBJECT = "{"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoPrompt:
    """A template and what can be told from it. fields: all names it uses, in lower case. last_turn: without what follows
    `.Response`. thinking_tags: empty when it has none. call_tag: what a tool call begins with."""

    template: Template
    last_turn: Template
    fields: frozenset[str]
    thinking_tags: tuple[str, str]
    call_tag: str

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        think: Think,
        *,
        today: date,
        allowance: Allowance | None = None,
    ) -> str:
        """The prompt for a chat. tools: None when none were mentioned. allowance: of work, None for as much as there is. Raises:
        bad_request for what the template does wrong, and when the allowance is used up."""
        system, turns = _collated(messages)
        if "messages" not in self.fields:
            return self._turns(turns, think, today, allowance or Allowance())
        data = {
            "System": system,
            "Messages": [_message(turn) for turn in turns],
            "Tools": _tools(tools),
            "Response": "",
            **_thinking(think),
        }
        return execute(self.template, data, today=today, allowance=allowance)

    def infill(self, prompt: str, suffix: str, think: Think, *, today: date, allowance: Allowance | None = None) -> str:
        """The prompt for what belongs between two texts. Raises: as chat."""
        data = {"Prompt": prompt, "Suffix": suffix, "Response": "", **_thinking(think)}
        return execute(self.template, data, today=today, allowance=allowance)

    def _turns(self, messages: Sequence[Message], think: Think, today: date, allowance: Allowance) -> str:
        rendered: list[str] = []
        turn = {"System": "", "Prompt": "", "Response": ""}

        def run(template: Template) -> None:
            rendered.append(execute(template, {**turn, **_thinking(think)}, today=today, allowance=allowance))
            turn.update(System="", Prompt="", Response="")

        for message in messages:
            match message.role:
                case "system":
                    if turn["Prompt"] or turn["Response"]:
                        run(self.template)
                    turn["System"] = message.content
                case "user":
                    if turn["Response"]:
                        run(self.template)
                    turn["Prompt"] = message.content
                case "assistant":
                    turn["Response"] = message.content
        run(self.last_turn)
        return "".join(rendered)


@lru_cache(maxsize=64)
def go_prompt(text: str) -> GoPrompt:
    """A template, understood; kept for the next request. Raises: bad_request with the line and what is wrong there."""
    template = parse(text)
    fields = frozenset(_names(template))
    if not fields & {"messages", "response"}:
        template = Template((*template.root, _RESPONSE), template.defined)
        fields |= {"response"}
    last_turn, _ = _until_response(template.root)
    return GoPrompt(
        template=template,
        last_turn=Template(last_turn, template.defined),
        fields=fields,
        thinking_tags=_thinking_tags(template.root),
        call_tag=_call_tag(template.root),
    )


def with_places(messages: Sequence[Message]) -> tuple[list[Message], list[bytes]]:
    """(the messages with a mark `[img-0]`, `[img-1]` … for each of their files, all files). A mark takes the place of an `[img]`
    that the text has for it, else it stands before the text. Source: ollama server/prompt.go imageTaggedMessages, fb30760."""
    marked: list[Message] = []
    media: list[bytes] = []
    for message in messages:
        before, content = "", message.content
        for data in message.images:
            mark = f"[img-{len(media)}]"
            if "[img]" in content:
                content = content.replace("[img]", mark, 1)
            else:
                before += mark
            media.append(data)
        marked.append(replace(message, content=before + content) if message.images else message)
    return marked, media


def check_template(text: str) -> None:
    """Raises: bad_request with Ollama's words for a template that cannot be read."""
    try:
        go_prompt(text)
    except CorralError as error:
        raise CorralError("bad_request", f"template error: {error.message}") from error


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _thinking(think: Think) -> dict[str, Any]:
    level = think if isinstance(think, str) else "medium" if think else ""
    return {"Think": bool(think), "ThinkLevel": level, "IsThinkSet": think is not None}


def _collated(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(what the system says, all messages with neighbours of one role joined). Answers of tools stay apart."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1].role == message.role != "tool":
            turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n\n{message.content}")
        else:
            turns.append(message)
    return system, turns


def _message(message: Message) -> Struct:
    calls = [
        Struct(
            kind="template.templateToolCall",
            members={
                "ID": call.id,
                "Function": Struct(
                    kind="template.templateToolCallFunction",
                    members={
                        "Index": call.function.index,
                        "Name": call.function.name,
                        "Arguments": _json_shown(_go_value(call.function.arguments, 0)),
                    },
                ),
            },
        )
        for call in message.tool_calls
    ]
    members: dict[str, Any] = {
        "Role": message.role,
        "Content": message.content,
        "Thinking": message.thinking,
        "Images": _unmade(message.images),
        "ToolCalls": _unmade(calls),
        "ToolName": message.tool_name,
        "ToolCallID": message.tool_call_id,
    }
    return Struct(kind="*template.templateMessage", members=members, json=lambda: Ordered(list(members.items())))


def _unmade(items: list[Any]) -> Any:
    """A list; an empty one as one that nobody made, which Go writes as null in JSON."""
    return items or Shown((), lambda: "[]", lambda: None)


def _json_shown(value: Any) -> Shown:
    return Shown(value, lambda: to_json(value))


def _go_value(value: Any, depth: int) -> Any:
    """A JSON value as Go decodes it: every number is a float, as long as that holds it exactly."""
    if depth > _MAX_SCHEMA_DEPTH * 2:
        raise CorralError("bad_request", "a value is nested too deeply")
    match value:
        case bool():
            return value
        case int() if abs(value) <= 2**53:
            return float(value)
        case list():
            return [_go_value(item, depth + 1) for item in value]
        case dict():
            return {key: _go_value(item, depth + 1) for key, item in value.items()}
        case _:
            return value


def _tools(tools: Sequence[dict[str, Any]] | None) -> Shown:
    if tools is None:
        return Shown((), lambda: "null", lambda: None)
    return _json_shown([_tool(tool) for tool in tools])


def _tool(tool: Mapping[str, Any]) -> Struct:
    function = _object(tool.get("function"))
    members = {"Type": _text(tool.get("type")), "Items": tool.get("items"), "Function": _function(function)}
    pairs = [("type", members["Type"]), *_set(tool, "items"), ("function", members["Function"])]
    return _printed("template.templateTool", members, pairs + _others(tool, ("type", "items", "function")))


def _function(function: Mapping[str, Any]) -> Struct:
    members = {
        "Name": _text(function.get("name")),
        "Description": _text(function.get("description")),
        "Parameters": _parameters(_object(function.get("parameters"))),
    }
    pairs = [(name.lower(), value) for name, value in members.items()]
    return _printed("template.templateToolFunction", members, pairs + _others(function, [name for name, _ in pairs]))


def _parameters(parameters: Mapping[str, Any]) -> Struct:
    given = parameters.get("properties")
    properties = {name: _property(_object(value), 0) for name, value in given.items()} if isinstance(given, dict) else None
    shown_properties = _json_shown(properties) if properties is not None else Shown({}, lambda: "{}", lambda: None)
    members = {
        "Type": _text(parameters.get("type")),
        "Defs": parameters.get("$defs"),
        "Items": parameters.get("items"),
        "Required": _list(parameters.get("required")),
        "Properties": shown_properties,
    }
    pairs = [("type", members["Type"]), *_set(parameters, "$defs", "items", "required"), ("properties", shown_properties)]
    known = ("type", "$defs", "items", "required", "properties")
    return _printed("template.templateToolFunctionParameters", members, pairs + _others(parameters, known))


def _property(given: Mapping[str, Any], depth: int) -> Struct:
    """A property of a tool's arguments: JSON Schema, with the type of a choice and of nested properties."""
    if depth > _MAX_SCHEMA_DEPTH:
        raise CorralError("bad_request", "a tool's parameters are nested too deeply")
    choices = [_property(_object(value), depth + 1) for value in _list(given.get("anyOf"))]
    types = [given["type"]] if isinstance(given.get("type"), str) else [_text(name) for name in _list(given.get("type"))]
    nested = given.get("properties")
    properties = (
        [(name, _property(_object(value), depth + 1)) for name, value in nested.items()] if isinstance(nested, dict) else None
    )
    members = {
        "AnyOf": choices,
        "Type": Shown(types, lambda: types[0] if len(types) == 1 else shown(types) if types else "", lambda: _one_or_all(types)),
        "Items": given.get("items"),
        "Description": _text(given.get("description")),
        "Enum": _go_value(_list(given.get("enum")), 0),
        "Properties": None if properties is None else dict(properties),
        "Required": _list(given.get("required")),
    }
    pairs: list[tuple[str, Any]] = [("anyOf", choices)] if choices else []
    pairs += [("type", _one_or_all(types))] if types else []
    pairs += _set(given, "items", "description", "enum")
    pairs += [("properties", Ordered(properties))] if properties is not None else []
    pairs += _set(given, "required")
    known = ("anyOf", "type", "items", "description", "enum", "properties", "required")
    methods = {"ToTypeScriptType": lambda: _typescript(choices, types)}
    everything = Ordered(pairs + _others(given, known))
    return Struct(kind="api.ToolProperty", members=members, methods=methods, json=lambda: everything)


def _printed(kind: str, members: Mapping[str, Any], pairs: Sequence[tuple[str, Any]]) -> Struct:
    """A struct that prints itself as JSON, of those pairs. Ollama fb30760 prints Go's own form for two of them, which older ones
    did not and no model was trained on; see docs/divergences.md."""
    content = Ordered(pairs)
    return Struct(kind=kind, members=members, methods={"String": lambda: to_json(content)}, json=lambda: content)


def _set(given: Mapping[str, Any], *names: str) -> list[tuple[str, Any]]:
    """The members among those that hold something, as Go's `omitempty` leaves them."""
    return [(name, value) for name in names if (value := given.get(name)) not in (None, "", [])]


def _others(given: Mapping[str, Any], known: Sequence[str]) -> list[tuple[str, Any]]:
    """What Ollama would drop; see docs/divergences.md."""
    return [(name, value) for name, value in given.items() if name not in known]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _one_or_all(types: list[str]) -> Any:
    return types[0] if len(types) == 1 else types


_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "array": "any[]",
    "object": "Record<string, any>",
    "null": "null",
}


def _typescript(choices: Sequence[Struct], types: Sequence[str]) -> str:
    if choices:
        return " | ".join(choice.methods["ToTypeScriptType"]() for choice in choices)
    return " | ".join(_TYPESCRIPT.get(name, "any") for name in types) or "any"


# ── What a template tells ────────────────────────────────────────────────────────────────────────────────────────────


def _names(template: Template) -> Iterator[str]:
    for nodes in (template.root, *template.defined.values()):
        yield from (name.lower() for name in _names_in(nodes))


def _names_in(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        match node:
            case Action() | Call():
                yield from _names_of(node.pipe) if node.pipe is not None else ()
            case Branch():
                yield from _names_of(node.pipe)
                yield from _names_in(node.body)
                yield from _names_in(node.other or ())
            case Text() | Jump():
                pass


def _names_of(operand: Operand) -> Iterator[str]:
    match operand:
        case Pipe():
            for part in (part for command in operand.commands for part in command):
                yield from _names_of(part)
        case Field() | Variable():
            yield from operand.names
        case Chain():
            yield from operand.names
            yield from _names_of(operand.of)
        case _:
            pass


def _until_response(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], bool]:
    """The nodes up to the one that prints `.Response`, and whether there is one."""
    kept: list[Node] = []
    for node in nodes:
        is_last = False
        match node:
            case Action():
                is_last = any(isinstance(field, Field) and "Response" in field.names for field in _operands(node.pipe))
            case Branch():
                body, is_last = _until_response(node.body)
                other = None
                if not is_last and node.other is not None:
                    other, is_last = _until_response(node.other)
                node = Branch(node.keyword, node.pipe, body, other)
            case _:
                pass
        kept.append(node)
        if is_last:
            return tuple(kept), True
    return tuple(kept), False


def _operands(pipe: Pipe) -> Iterator[Operand]:
    """All operands, those in parentheses too."""
    for operand in (operand for command in pipe.commands for operand in command):
        yield operand
        if isinstance(operand, Pipe):
            yield from _operands(operand)


def _thinking_tags(root: Sequence[Node]) -> tuple[str, str]:
    """The first and the last text of the innermost nodes around `.Thinking`, while messages are walked."""
    opening = closing = ""
    for nodes in _nodes_of_thinking(root, is_walking=False):
        first, last = nodes[0], nodes[-1]
        opening = first.text.strip() if isinstance(first, Text) else opening
        closing = last.text.strip() if isinstance(last, Text) else closing
    return (opening, closing) if opening and closing else ("", "")


def _nodes_of_thinking(nodes: Sequence[Node], *, is_walking: bool) -> Iterator[Sequence[Node]]:
    for node in nodes:
        if isinstance(node, Text | Jump) or node.pipe is None:
            continue
        fields = [operand.names[0] for operand in _operands(node.pipe) if isinstance(operand, Field)]
        is_range = isinstance(node, Branch) and node.keyword == "range"
        inner = "Messages" in fields if is_range else is_walking
        if inner and "Thinking" in fields:
            yield nodes
        if isinstance(node, Branch):
            yield from _nodes_of_thinking(node.body, is_walking=inner)
            yield from _nodes_of_thinking(node.other or (), is_walking=inner)


def _call_tag(root: Sequence[Node]) -> str:
    """The text that stands before the JSON of a call."""
    branch = _calls_branch(root)
    text = _first_text(branch.body) if branch is not None else None
    return (text or "").replace("\r\n", "\n").partition("{")[0].strip() or ANY_OBJECT


def _calls_branch(nodes: Sequence[Node]) -> Branch | None:
    """The first `if` that asks for `.ToolCalls`."""
    for node in nodes:
        if not isinstance(node, Branch):
            continue
        operands = [operand for command in node.pipe.commands for operand in command]
        asks = any(isinstance(operand, Field) and "ToolCalls" in operand.names for operand in operands)
        if node.keyword == "if" and asks:
            return node
        found = _calls_branch(node.body) or _calls_branch(node.other or ())
        if found is not None:
            return found
    return None


def _first_text(nodes: Sequence[Node]) -> str | None:
    """The first text that is more than space, unless something is printed before it."""
    for node in nodes:
        match node:
            case Text() if node.text.strip():
                return node.text
            case Branch():
                return _first_text(node.body) or _first_text(node.other or ())
            case Action():
                return None
            case _:
                pass
    return None
