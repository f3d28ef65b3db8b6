"""The tree of a Go template: what wire.gosyntax reads and wire.gotemplate carries out."""

from collections.abc import Mapping
from dataclasses import dataclass

from corral.wire.errors import CorralError


@dataclass(frozen=True, slots=True)
class Text:
    """Text between actions, already trimmed."""

    text: str


@dataclass(frozen=True, slots=True)
class Dot:
    """`.`"""


@dataclass(frozen=True, slots=True)
class Nil:
    """`nil`"""


@dataclass(frozen=True, slots=True)
class Literal:
    """A text, number or truth value."""

    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class Field:
    """`.A.B`. names: without dots."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """`$x.A`. names: the variable's own first, with its `$`."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """The name of a known function."""

    name: str


@dataclass(frozen=True, slots=True)
class Chain:
    """Fields of what parentheses or a function give: `(…).A.B`."""

    of: "Operand"
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pipe:
    """Commands, each with its operands. variables: what the result goes to. is_assignment: `=` rather than `:=`."""

    commands: tuple[tuple["Operand", ...], ...]
    variables: tuple[str, ...]
    is_assignment: bool
    line: int


@dataclass(frozen=True, slots=True)
class Action:
    """A pipeline that is printed unless it declares or assigns."""

    pipe: Pipe


@dataclass(frozen=True, slots=True)
class Branch:
    """keyword: if, with or range. other: None without an else."""

    keyword: str
    pipe: Pipe
    body: tuple["Node", ...]
    other: tuple["Node", ...] | None


@dataclass(frozen=True, slots=True)
class Call:
    """`template "name" pipeline`."""

    name: str
    pipe: Pipe | None
    line: int


@dataclass(frozen=True, slots=True)
class Jump:
    """keyword: break or continue."""

    keyword: str


Operand = Dot | Nil | Literal | Field | Variable | Function | Chain | Pipe
Node = Text | Action | Branch | Call | Jump


@dataclass(frozen=True, slots=True)
class Template:
    """root: what is run. defined: the templates it may call, by name."""

    root: tuple[Node, ...]
    defined: Mapping[str, tuple[Node, ...]]


def fault(line: int, text: str) -> CorralError:
    """The error for a place in a template, in Go's form."""
    return CorralError("bad_request", f"template: :{line}: {text}")
