"""Go's text/template, run on data: the part of the language that chat templates are written in. Pure.

A template comes out of a model that anybody may have made, or out of a request, so everything is bounded: its size and nesting
when it is parsed, and here the steps, the depth of calls and the characters it may make. It reaches nothing but the data it is
given: a field is a key of a mapping or a declared member of a `Struct`, never an attribute of a Python object.

Where Go's kinds differ from Python's, Go's behaviour is kept: texts are measured in bytes, mappings are walked in the order of
their keys, a field that is missing from a mapping is nil. Source: Go's text/template, 1.26; ollama template/template.go, fb30760,
for the four functions it adds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import quote_plus

from corral.wire.errors import CorralError
from corral.wire.gosyntax import parse
from corral.wire.gotree import (
    Action,
    Branch,
    Call,
    Chain,
    Dot,
    Field,
    Function,
    Jump,
    Literal,
    Nil,
    Node,
    Operand,
    Pipe,
    Template,
    Text,
    Variable,
    fault,
)
from corral.wire.govalues import Shown, Struct, is_sequence, is_true, plain, shown, sprint, sprintf, to_json

#: A long chat under the most elaborate template known takes some ten thousand.
MAX_STEPS = 300_000
#: Of the result, and of all that functions make on the way.
MAX_CHARACTERS = 16 * 1024 * 1024
_MAX_DEPTH = 100
#: Copying or comparing so many characters or items counts as one step.
_PER_STEP = 1024
#: Sorting so many keys does.
_SORTED_PER_STEP = 8
#: Writing so many characters of a list, mapping or struct, or escaping them, does.
_SHOWN_PER_STEP = 16
NO_VALUE = "<no value>"
_TYPES = {str: "string", bool: "bool", int: "int", float: "float64"}


@dataclass(slots=True)
class Allowance:
    """What executions may still do, all that share one taken together. steps: below zero when they wanted more."""

    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS


@lru_cache(maxsize=64)
def parsed(text: str) -> Template:
    """The tree of a template, kept for the next request. Raises: bad_request."""
    return parse(text)


def execute(template: Template, data: Mapping[str, Any], *, today: date, allowance: Allowance | None = None) -> str:
    """What a template makes of data. allowance: used up as it runs; None for a whole one. Raises: bad_request with the line for
    whatever goes wrong in it, limits included."""
    run = _Run(template.defined, data, today, allowance or Allowance())
    try:
        run.walk(template.root, data)
    except RecursionError as error:  # the depth is bounded well below; this is for data that is nested deeply
        raise CorralError("bad_request", "template: nested too deeply") from error
    return "".join(run.out)


class _Run:
    """One execution. out: the pieces of the result. line: of the action that is being run."""

    def __init__(self, defined: Mapping[str, tuple[Node, ...]], data: Any, today: date, allowance: Allowance) -> None:
        self.out: list[str] = []
        self._defined = defined
        self._today = today
        self._variables: list[tuple[str, Any]] = [("$", data)]
        self._line = 1
        self._allowance = allowance
        self._depth = 0

    # ── Limits ──

    def spend(self, steps: int = 1) -> None:
        """Count work."""
        self._allowance.steps -= steps
        if self._allowance.steps < 0:
            raise self._fault("takes too many steps")

    def made(self, text: str) -> str:
        """Count characters that were made."""
        self._allowance.characters -= len(text)
        if self._allowance.characters < 0:
            raise self._fault("makes too much text")
        return text

    def text_of(self, value: Any) -> str:
        """A value as it is printed; what is made for it counts as work, since it may be JSON or many values."""
        if isinstance(value, str):
            return value
        text = shown(value)
        self.spend(len(text) // _SHOWN_PER_STEP)
        return text

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._fault("exceeded maximum template depth")

    def _fault(self, text: str) -> CorralError:
        return fault(self._line, text)

    # ── Nodes ──

    def walk(self, nodes: Iterable[Node], dot: Any) -> str:
        """Run the nodes; gives `break` or `continue` when one was met, which ends them early."""
        self._deeper()
        for node in nodes:
            self.spend()
            match node:
                case Text():
                    self.out.append(self.made(node.text))
                case Action():
                    self._act(node.pipe, dot)
                case Branch():
                    if jump := self._branch(node, dot):
                        self._depth -= 1
                        return jump
                case Call():
                    self._call_template(node, dot)
                case Jump():
                    self._depth -= 1
                    return node.keyword
        self._depth -= 1
        return ""

    def _act(self, pipe: Pipe, dot: Any) -> None:
        value = self._pipe(pipe, dot)
        if not pipe.variables:
            self.out.append(self.made(NO_VALUE if value is None else self.text_of(value)))

    def _branch(self, branch: Branch, dot: Any) -> str:
        mark = len(self._variables)
        value = self._pipe(branch.pipe, dot)
        if branch.keyword == "range":
            jump = self._range(branch, value, dot)
        elif is_true(value):
            jump = self.walk(branch.body, value if branch.keyword == "with" else dot)
        else:
            jump = self.walk(branch.other, dot) if branch.other is not None else ""
        del self._variables[mark:]
        return jump

    def _range(self, branch: Branch, value: Any, dot: Any) -> str:
        mark = len(self._variables)
        is_empty = True
        for index, item in self._items(value, branch.pipe):
            is_empty = False
            self.spend()
            self._set_items(branch.pipe, index, item)
            jump = self.walk(branch.body, item)
            del self._variables[mark:]
            if jump == "break":
                break
        if is_empty and branch.other is not None:
            return self.walk(branch.other, dot)
        return ""

    def _items(self, value: Any, pipe: Pipe) -> Iterable[tuple[Any, Any]]:
        value = plain(value)
        match value:
            case None:
                return ()
            case list() | tuple():
                return enumerate(value)
            case Mapping():
                self.spend(len(value) // _SORTED_PER_STEP)
                return [(key, value[key]) for key in sorted(value)]
            case int() if not isinstance(value, bool) and len(pipe.variables) < 2:
                return ((None, number) for number in range(value))
            case _:
                raise self._fault(f"range can't iterate over {shown(value)[:40]}")

    def _set_items(self, pipe: Pipe, index: Any, item: Any) -> None:
        match pipe.variables:
            case (name,):
                pairs = [(name, item)]
            case (first, second):
                pairs = [(first, index), (second, item)]
            case _:
                return
        for name, value in pairs:
            # The pipeline has declared both already, with the whole value.
            self._assign(name, value)

    def _call_template(self, call: Call, dot: Any) -> None:
        self._line = call.line
        nodes = self._defined.get(call.name)
        if nodes is None:
            raise self._fault(f'template "{call.name}" not defined')
        data = self._pipe(call.pipe, dot) if call.pipe else None
        outer, self._variables = self._variables, [("$", data)]
        self.walk(nodes, data)
        self._variables = outer

    # ── Pipelines ──

    def _pipe(self, pipe: Pipe, dot: Any) -> Any:
        self._deeper()
        self._line = pipe.line
        value = self._command(pipe.commands[0], dot, ())
        for command in pipe.commands[1:]:
            value = self._command(command, dot, (value,))
        for name in pipe.variables:
            if pipe.is_assignment:
                self._assign(name, value)
            else:
                self._variables.append((name, value))
        self._depth -= 1
        return value

    def _assign(self, name: str, value: Any) -> None:
        for index in range(len(self._variables) - 1, -1, -1):
            if self._variables[index][0] == name:
                self._variables[index] = (name, value)
                return
        raise self._fault(f"undefined variable: {name}")

    def _command(self, command: Sequence[Operand], dot: Any, final: tuple[Any, ...]) -> Any:
        """The value of one command. final: the value of the one before it, which is its last argument."""
        first = command[0]
        if isinstance(first, Function):
            return self._call(first.name, command[1:], dot, final)
        if len(command) > 1 or final:
            raise self._fault("can't give argument to non-function")
        if isinstance(first, Nil):
            raise self._fault("nil is not a command")
        return self._value(first, dot)

    def _value(self, operand: Operand, dot: Any) -> Any:
        self.spend()
        match operand:
            case Literal():
                return operand.value
            case Dot():
                return dot
            case Field():
                return self._fields(dot, operand.names)
            case Variable():
                value = next(value for name, value in reversed(self._variables) if name == operand.names[0])
                return self._fields(value, operand.names[1:])
            case Pipe():
                return self._pipe(operand, dot)
            case Chain():
                return self._fields(self._value(operand.of, dot), operand.names)
            case Function():
                return self._call(operand.name, (), dot, ())
            case Nil():
                return None

    def _fields(self, value: Any, names: Sequence[str]) -> Any:
        if value is None:
            return None
        for name in names:
            if value is None:
                raise self._fault(f"nil pointer evaluating interface {{}}.{name}")
            value = self._member(value, name)
        return value

    def _member(self, value: Any, name: str) -> Any:
        if isinstance(value, Struct):
            if name in value.methods:
                return self.made(self.text_of(Shown((), value.methods[name])))
            if name in value.members:
                return value.members[name]
        elif isinstance(value, Shown) and name == "String":
            return self.made(self.text_of(value))
        elif isinstance(inner := plain(value), Mapping):
            return inner.get(name)
        raise self._fault(f"can't evaluate field {name} in type {_type(value)}")

    # ── Functions ──

    def _call(self, name: str, operands: Sequence[Operand], dot: Any, final: tuple[Any, ...]) -> Any:
        if name in ("and", "or"):
            return self._first(operands, dot, final, is_or=name == "or")
        values = [*(self._value(operand, dot) for operand in operands), *final]
        least, most, function = _FUNCTIONS[name]
        if not least <= len(values) <= most:
            raise self._fault(f"wrong number of args for {name}: got {len(values)}")
        self.spend(1 + sum(map(_weight, values)))
        try:
            result = function(self, values)
        except _Refused as error:
            raise self._fault(f"error calling {name}: {error}") from error
        if not isinstance(result, str):
            return result
        if not all(isinstance(value, str | int | float | None) for value in values):
            self.spend(len(result) // _SHOWN_PER_STEP)
        return self.made(result)

    def _first(self, operands: Sequence[Operand], dot: Any, final: tuple[Any, ...], *, is_or: bool) -> Any:
        """`and` and `or`: the first operand that decides, else the last; what comes after is not run."""
        if not operands and not final:
            raise self._fault(f"wrong number of args for {'or' if is_or else 'and'}: want at least 1 got 0")
        value = None
        for operand in operands:
            value = self._value(operand, dot)
            if is_true(value) is is_or:
                return value
        return final[0] if final else value

    @property
    def today(self) -> date:
        """For currentDate and yesterdayDate."""
        return self._today


class _Refused(Exception):
    """What a function says of its arguments. Never leaves this module."""


def _weight(value: Any) -> int:
    return len(value) // _PER_STEP if isinstance(value, str | list | tuple) else 0


def _type(value: Any) -> str:
    if isinstance(value, Struct):
        return value.kind
    value = plain(value)
    return _TYPES.get(type(value)) or ("[]interface {}" if is_sequence(value) else "map[string]interface {}")


def _index_of(value: Any, bound: int) -> int:
    if value is None:
        raise _Refused("cannot index slice/array with nil")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Refused(f"cannot index slice/array with type {_type(value)}")
    if not 0 <= value <= bound:
        raise _Refused(f"index out of range: {value}")
    return value


def _len(run: _Run, values: list[Any]) -> int:
    value = plain(values[0])
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if is_sequence(value) or isinstance(value, Mapping):
        return len(value)
    raise _Refused(f"len of type {_type(value)}" if value is not None else "len of nil pointer")


def _index(run: _Run, values: list[Any]) -> Any:
    value = values[0]
    if value is None:
        raise _Refused("index of untyped nil")
    for index in values[1:]:
        value = plain(value)
        if isinstance(value, Mapping):
            if not isinstance(index, str):
                raise _Refused(f"value has type {_type(index)}; should be string")
            value = value.get(index)
        elif isinstance(value, str):
            content = value.encode()
            value = content[_index_of(index, len(content) - 1)]
        elif is_sequence(value):
            value = value[_index_of(index, len(value) - 1)]
        else:
            raise _Refused("index of nil pointer" if value is None else f"can't index item of type {_type(value)}")
    return value


def _slice(run: _Run, values: list[Any]) -> Any:
    value = plain(values[0])
    if value is None:
        raise _Refused("slice of untyped nil")
    if isinstance(value, str) and len(values) == 4:
        raise _Refused("cannot 3-index slice a string")
    if not isinstance(value, str) and not is_sequence(value):
        raise _Refused(f"can't slice item of type {_type(value)}")
    content = value.encode() if isinstance(value, str) else value
    bounds = [_index_of(index, len(content)) for index in values[1:]]
    bounds += [0, len(content)][len(bounds) :]
    if sorted(bounds) != bounds:
        raise _Refused(f"invalid slice index: {bounds[0]} > {bounds[1]}")
    part = content[bounds[0] : bounds[1]]
    return part.decode(errors="replace") if isinstance(part, bytes) else part


def _kind(value: Any) -> str:
    """Of what can be compared; empty for anything else."""
    return _TYPES.get(type(value), "")


def _eq(run: _Run, values: list[Any]) -> bool:
    first, kind = values[0], _kind(values[0])
    if len(values) < 2:
        raise _Refused("missing argument for comparison")
    for value in values[1:]:
        if kind != _kind(value):
            if first is not None and value is not None:
                raise _Refused(f"incompatible types for comparison: {_type(first)} and {_type(value)}")
        elif kind == "" and first is not None and value is not None:
            raise _Refused(f"non-comparable type {_type(value)}")
        elif first == value:
            return True
    return False


def _ne(run: _Run, values: list[Any]) -> bool:
    return not _eq(run, values)


def _lt(run: _Run, values: list[Any]) -> bool:
    first, second = values
    kinds = {_kind(first), _kind(second)}
    if "" in kinds or kinds == {"bool"}:
        raise _Refused("invalid type for comparison")
    if len(kinds) > 1:
        raise _Refused(f"incompatible types for comparison: {_type(first)} and {_type(second)}")
    is_less: bool = first.encode() < second.encode() if isinstance(first, str) else first < second
    return is_less


def _le(run: _Run, values: list[Any]) -> bool:
    return _lt(run, values) or _eq(run, values)


def _not(run: _Run, values: list[Any]) -> bool:
    return not is_true(values[0])


def _printf(run: _Run, values: list[Any]) -> str:
    if not isinstance(values[0], str):
        raise _Refused("the format is no string")
    text = sprintf(values[0], values[1:])
    # Quoting goes letter by letter.
    run.spend(len(text) // _SHOWN_PER_STEP if "q" in values[0] else 0)
    return text


def _println(run: _Run, values: list[Any]) -> str:
    return " ".join(map(shown, values)) + "\n"


def _escaped(escape: Callable[[str], str]) -> Callable[[_Run, list[Any]], str]:
    """A function that escapes what `print` would give."""

    def function(run: _Run, values: list[Any]) -> str:
        text = sprint([NO_VALUE if value is None else value for value in values])
        run.spend(len(text) // _SHOWN_PER_STEP)
        return escape(text)

    return function


_HTML = str.maketrans({"\0": "\ufffd", '"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;"})
_JS = str.maketrans({"\\": "\\\\", "'": "\\'", '"': '\\"', "<": "\\u003C", ">": "\\u003E", "&": "\\u0026", "=": "\\u003D"})


def _html(text: str) -> str:
    return text.translate(_HTML)


def _js(text: str) -> str:
    kept = text.translate(_JS)
    return kept if kept.isprintable() else "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in kept)


def _call_function(run: _Run, values: list[Any]) -> Any:
    raise _Refused("call of nil" if values[0] is None else f"non-function of type {_type(values[0])}")


def _typescript(run: _Run, values: list[Any]) -> str:
    value = values[0]
    method = value.methods.get("ToTypeScriptType") if isinstance(value, Struct) else None
    return method() if method else "any"


_ANY = 1000
#: name -> (fewest arguments, most, function). `and` and `or` are part of the evaluator, since they may leave arguments alone.
_FUNCTIONS: Mapping[str, tuple[int, int, Callable[[_Run, list[Any]], Any]]] = {
    "not": (1, 1, _not),
    "len": (1, 1, _len),
    "index": (1, _ANY, _index),
    "slice": (1, 4, _slice),
    "eq": (1, _ANY, _eq),
    "ne": (2, 2, _ne),
    "lt": (2, 2, _lt),
    "le": (2, 2, _le),
    "gt": (2, 2, lambda run, values: not _le(run, values)),
    "ge": (2, 2, lambda run, values: not _lt(run, values)),
    "print": (0, _ANY, lambda _, values: sprint(values)),
    "printf": (1, _ANY, _printf),
    "println": (0, _ANY, _println),
    "html": (0, _ANY, _escaped(_html)),
    "js": (0, _ANY, _escaped(_js)),
    "urlquery": (0, _ANY, _escaped(quote_plus)),
    "call": (1, _ANY, _call_function),
    "json": (1, 1, lambda _, values: to_json(values[0])),
    "currentDate": (0, _ANY, lambda run, _: run.today.isoformat()),
    "yesterdayDate": (0, _ANY, lambda run, _: (run.today - timedelta(days=1)).isoformat()),
    "toTypeScriptType": (1, 1, _typescript),
}
