"""The grammar of Go's text/template: text in, a tree out. What the tree means is said by wire.gotemplate.

The whole text is cut into tokens first, in one pass without going back, then read by descent with a bound on its depth, so that
no template costs more than its length. Left out are complex numbers and Go's obscurer number forms. Messages have the form of
Go's own. Source: Go's text/template/parse, 1.26, for what is accepted and what is refused.
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from corral.wire.errors import CorralError
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

MAX_TEMPLATE_CHARACTERS = 256 * 1024
#: Blocks in blocks and parentheses in parentheses; well-known templates stay below ten.
MAX_NESTING = 80

FUNCTIONS = frozenset({
    "and", "or", "not", "len", "index", "slice", "print", "printf", "println", "html", "js", "urlquery", "call",
    "eq", "ne", "lt", "le", "gt", "ge", "json", "currentDate", "yesterdayDate", "toTypeScriptType",
})  # fmt: skip


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
      | (?P<string>"(?:[^"\\\n]|\\[^\n])*+")
      | (?P<raw>`[^`]*+`)
      | (?P<character>'(?:[^'\\\n]|\\[^\n])*+')
      | (?P<declare>:=)
      | (?P<mark>[=|,()])
      | (?P<number>[+-]?\.?[0-9](?:[eEpP][+-]|[\w.])*+)
      | (?P<variable>\$\w*+)
      | (?P<field>\.\w++)
      | (?P<dot>\.)
      | (?P<word>[^\W\d]\w*+)""",
    re.VERBOSE,
)
#: What may stand behind a word, a field or a variable.
_TERMINATORS = _SPACE + ".,|:()"
_KEYWORDS = frozenset({"block", "break", "continue", "define", "else", "end", "if", "range", "template", "with"})
_OPENS, _CLOSES, _END = "{{", "}}", "end of text"


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int


def _tokens(text: str) -> Iterator[_Token]:
    """Texts, delimiters and what stands between them; spaces inside actions included, comments not."""
    at, line, trims = 0, 1, False
    while True:
        start = text.find(_OPENS, at)
        between = text[at:] if start < 0 else text[at:start]
        trims_before = start >= 0 and text[start + 2 : start + 3] == "-" and text[start + 3 : start + 4] in tuple(_SPACE)
        kept = between.lstrip(_SPACE) if trims else between
        kept = kept.rstrip(_SPACE) if trims_before else kept
        if kept:
            yield _Token("text", kept, line)
        line += between.count("\n")
        if start < 0:
            yield _Token(_END, "", line)
            return
        inside = start + (4 if trims_before else 2)
        # The space that a trim mark needs belongs to the mark; more of it may stand before a comment.
        if text.startswith("/*", inside):
            end = _after_comment(text, inside, line)
            at = end
        else:
            yield _Token(_OPENS, _OPENS, line)
            at = yield from _action_tokens(text, inside, line + text.count("\n", start, inside))
        line += text.count("\n", start, at)
        trims = text[at - 3] == "-" and text[at - 4] in _SPACE


def _after_comment(text: str, at: int, line: int) -> int:
    close = text.find("*/", at + 2)
    if close < 0:
        raise fault(line, "unclosed comment")
    end = close + 2
    if text.startswith(_CLOSES, end):
        return end + 2
    if text[end : end + 1] in tuple(_SPACE) and text.startswith("-}}", end + 1):
        return end + 4
    raise fault(line, "comment ends before closing delimiter")


def _action_tokens(text: str, at: int, line: int) -> Generator[_Token, None, int]:
    """The tokens of one action with its right delimiter; gives the place behind that."""
    parentheses = 0
    while True:
        if text.startswith(_CLOSES, at):
            if parentheses:
                raise fault(line, "unclosed left paren")
            yield _Token(_CLOSES, _CLOSES, line)
            return at + 2
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise fault(line, _unexpected_character(text, at))
        kind, found = match.lastgroup, match[0]
        at = match.end()
        if kind == "space" and text.startswith("-}}", at):
            at += 1
        is_name = kind in ("word", "field", "variable")
        if is_name and text[at : at + 1] not in _TERMINATORS and not text.startswith(_CLOSES, at):
            raise fault(line, f"bad character {text[at]!r}")
        parentheses += (found == "(") - (found == ")")
        if parentheses < 0:
            raise fault(line, "unexpected right paren")
        if kind == "word" and found in _KEYWORDS:
            kind = found
        yield _Token(found if kind == "mark" else kind, found, line)
        line += found.count("\n")


def _unexpected_character(text: str, at: int) -> str:
    if at >= len(text):
        return "unclosed action"
    kind = {'"': "unterminated quoted string", "`": "unterminated raw quoted string", "'": "unterminated character constant"}
    return kind.get(text[at], f"unexpected {text[at]!r} in action")


# ── The parser ───────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(text: str) -> Template:
    """The tree of a template. Raises: bad_request with the line and what is wrong there."""
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise CorralError("bad_request", f"template: longer than {MAX_TEMPLATE_CHARACTERS} characters")
    return _Parser(list(_tokens(text))).template()


@dataclass(slots=True)
class _Scope:
    """What a definition knows of its surroundings: nothing but `$`."""

    variables: list[str] = field(default_factory=lambda: ["$"])
    ranges: int = 0


class _Parser:
    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0
        self._scope = _Scope()
        self._defined: dict[str, tuple[Node, ...]] = {}

    def template(self) -> Template:
        nodes: list[Node] = []
        while self._peek().kind != _END:
            if self._starts_definition():
                continue
            node = self._node()
            if isinstance(node, _Token):
                raise fault(node.line, f"unexpected {{{{{node.kind}}}}}")
            nodes.append(node)
        return Template(tuple(nodes), self._defined)

    # ── Tokens ──

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _next(self) -> _Token:
        token = self._tokens[self._at]
        self._at += token.kind != _END
        return token

    def _peek_past_space(self) -> _Token:
        while self._tokens[self._at].kind == "space":
            self._at += 1
        return self._tokens[self._at]

    def _next_past_space(self) -> _Token:
        self._peek_past_space()
        return self._next()

    def _expect(self, kind: str, context: str) -> _Token:
        token = self._next_past_space()
        if token.kind != kind:
            _unexpected(token, context)
        return token

    # ── Nodes ──

    def _starts_definition(self) -> bool:
        start = self._at
        if self._next().kind == _OPENS and self._next_past_space().kind == "define":
            self._definition()
            return True
        self._at = start
        return False

    def _definition(self) -> None:
        name = self._name("define clause")
        self._expect(_CLOSES, "define clause")
        self._add(name, self._own_scope("define clause"))

    def _own_scope(self, context: str) -> tuple[Node, ...]:
        """The nodes up to an end, where no variable from outside is known."""
        outer, self._scope = self._scope, _Scope()
        nodes, end = self._nodes()
        self._scope = outer
        if end.kind != "end":
            _unexpected(end, context)
        return nodes

    def _add(self, name: str, nodes: tuple[Node, ...]) -> None:
        """A definition of nothing but space gives way to any other; two real ones are a mistake."""
        line = self._peek().line
        before = self._defined.get(name, ())
        if not _is_empty(before) and not _is_empty(nodes):
            raise fault(line, f'template: multiple definition of template "{name}"')
        if _is_empty(before):
            self._defined[name] = nodes

    def _nodes(self) -> tuple[tuple[Node, ...], _Token]:
        """Everything up to an end or else of this level, and that token."""
        self._deeper()
        nodes: list[Node] = []
        while True:
            token = self._peek_past_space()
            if token.kind == _END:
                raise fault(token.line, "unexpected EOF")
            node = self._node()
            if isinstance(node, _Token):
                self._depth -= 1
                return tuple(nodes), node
            nodes.append(node)

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise fault(self._peek().line, "nested too deeply")

    def _node(self) -> Node | _Token:
        """The next node, or the end or else that stands there instead."""
        token = self._next_past_space()
        if token.kind == "text":
            return Text(token.text)
        if token.kind != _OPENS:
            _unexpected(token, "input")
        token = self._peek_past_space()
        if token.kind not in _KEYWORDS:
            return Action(self._pipe("command", _CLOSES))
        self._next()
        if token.kind == "define":
            _unexpected(token, "command")
        match token.kind:
            case "if" | "with" | "range":
                return self._branch(token.kind)
            case "break" | "continue":
                return self._jump(token)
            case "template":
                return self._template_call(token)
            case "block":
                return self._block(token)
            case _:
                if token.kind == "end" or self._peek_past_space().kind not in ("if", "with"):
                    self._expect(_CLOSES, token.kind)
                return token

    def _template_call(self, token: _Token) -> Call:
        name = self._name("template clause")
        if self._peek_past_space().kind != _CLOSES:
            return Call(name, self._pipe("template clause", _CLOSES), token.line)
        self._next()
        return Call(name, None, token.line)

    def _block(self, token: _Token) -> Call:
        """A definition and its call in one."""
        name = self._name("block clause")
        pipe = self._pipe("block clause", _CLOSES)
        self._add(name, self._own_scope("block clause"))
        return Call(name, pipe, token.line)

    def _jump(self, token: _Token) -> Jump:
        self._expect(_CLOSES, f"{{{{{token.kind}}}}}")
        if not self._scope.ranges:
            raise fault(token.line, f"{{{{{token.kind}}}}} outside {{{{range}}}}")
        return Jump(token.kind)

    def _branch(self, keyword: str) -> Branch:
        variables = len(self._scope.variables)
        pipe = self._pipe(keyword, _CLOSES)
        self._scope.ranges += keyword == "range"
        body, end = self._nodes()
        self._scope.ranges -= keyword == "range"
        other: tuple[Node, ...] | None = None
        if end.kind == "else":
            other = self._otherwise(keyword)
        del self._scope.variables[variables:]
        return Branch(keyword, pipe, body, other)

    def _otherwise(self, keyword: str) -> tuple[Node, ...]:
        follows = self._peek_past_space()
        if follows.kind in ("if", "with"):
            if follows.kind != keyword:
                _unexpected(follows, "else")
            self._next()
            self._deeper()
            # `else if` is a branch of its own whose end serves both.
            other = (self._branch(keyword),)
            self._depth -= 1
            return other
        nodes, end = self._nodes()
        if end.kind != "end":
            raise fault(end.line, f"expected end; found {{{{{end.kind}}}}}")
        return nodes

    def _name(self, context: str) -> str:
        token = self._next_past_space()
        if token.kind not in ("string", "raw"):
            _unexpected(token, context)
        return _unquoted(token)

    # ── Pipelines ──

    def _pipe(self, context: str, end: str) -> Pipe:
        self._deeper()
        line = self._peek_past_space().line
        variables, is_assignment = self._declared(context)
        commands: list[tuple[Operand, ...]] = []
        while (token := self._peek_past_space()).kind != end:
            if token.kind in (_CLOSES, _END, "|", ")", "=", ",", "declare") or token.kind in _KEYWORDS:
                _unexpected(token, context)
            commands.append(self._command(context))
        self._next()
        if not commands:
            raise fault(line, f"missing value for {context}")
        for stage, command in enumerate(commands[1:], 2):
            if isinstance(command[0], Literal | Dot | Nil):
                raise fault(line, f"non executable command in pipeline stage {stage}")
        self._depth -= 1
        return Pipe(tuple(commands), variables, is_assignment, line)

    def _declared(self, context: str) -> tuple[tuple[str, ...], bool]:
        """The variables before `:=` or `=`."""
        names: list[str] = []
        while True:
            start = self._at
            token = self._peek_past_space()
            if token.kind != "variable":
                break
            self._next()
            mark = self._peek_past_space()
            if mark.kind in ("declare", "="):
                self._next()
                names.append(token.text)
                self._scope.variables += names
                return tuple(names), mark.kind == "="
            if mark.kind != ",":
                break
            self._next()
            names.append(token.text)
            if context != "range" or len(names) > 1:
                raise fault(token.line, f"too many declarations in {context}")
            if self._peek_past_space().kind != "variable":
                raise fault(token.line, "range can only initialize variables")
        if names:
            raise fault(self._peek().line, "range can only initialize variables")
        self._at = start
        return (), False

    def _command(self, context: str) -> tuple[Operand, ...]:
        """Operands up to a `|`, which is taken, or the end of the pipeline, which is left."""
        operands: list[Operand] = []
        while True:
            operand = self._operand()
            if operand is not None:
                operands.append(operand)
            token = self._next()
            if token.kind == "space":
                continue
            if token.kind in (_CLOSES, ")"):
                self._at -= 1
            elif token.kind != "|":
                _unexpected(token, "operand")
            elif self._peek_past_space().kind in (_CLOSES, ")"):
                raise fault(token.line, f"missing value for {context}")
            break
        if not operands:
            raise fault(token.line, "empty command")
        return tuple(operands)

    def _operand(self) -> Operand | None:
        term = self._term()
        names: list[str] = []
        while term is not None and self._peek().kind == "field":
            names.append(self._next().text[1:])
        if term is None or not names:
            return term
        if isinstance(term, Field | Variable):
            return type(term)((*term.names, *names))
        if isinstance(term, Literal | Nil | Dot):
            raise fault(self._peek().line, "unexpected . after term")
        return Chain(term, tuple(names))

    def _term(self) -> Operand | None:
        token = self._peek_past_space()
        match token.kind:
            case "word" if token.text in ("true", "false"):
                term: Operand = Literal(token.text == "true")
            case "word" if token.text == "nil":
                term = Nil()
            case "word":
                if token.text not in FUNCTIONS:
                    raise fault(token.line, f'function "{token.text}" not defined')
                term = Function(token.text)
            case "dot":
                term = Dot()
            case "field":
                term = Field((token.text[1:],))
            case "variable":
                if token.text not in self._scope.variables:
                    raise fault(token.line, f'undefined variable "{token.text}"')
                term = Variable((token.text,))
            case "string" | "raw":
                term = Literal(_unquoted(token))
            case "character":
                term = Literal(_character(token))
            case "number":
                term = Literal(_number(token))
            case "(":
                self._next()
                return self._pipe("parenthesized pipeline", ")")
            case _:
                return None
        self._next()
        return term


def _unexpected(token: _Token, context: str) -> NoReturn:
    shown = "EOF" if token.kind == _END else repr(token.text[:20])
    raise fault(token.line, f"unexpected {shown} in {context}")


def _is_empty(nodes: tuple[Node, ...]) -> bool:
    return all(isinstance(node, Text) and not node.text.strip() for node in nodes)


# ── Constants ────────────────────────────────────────────────────────────────────────────────────────────────────────

_ESCAPE = re.compile(r"\\(?:([abfnrtv\\'\"])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.?))", re.DOTALL)
_SHORT = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}


def _unquoted(token: _Token) -> str:
    inner = token.text[1:-1]
    if token.kind == "raw":
        return inner.replace("\r", "")
    if "\\" not in inner:
        return inner
    # Escapes may write single bytes of a character, so the text is put together as bytes.
    parts: list[bytes] = []
    at = 0
    for match in _ESCAPE.finditer(inner):
        parts += [inner[at : match.start()].encode(), _escaped(match, token)]
        at = match.end()
    return b"".join([*parts, inner[at:].encode()]).decode(errors="replace")


def _escaped(match: "re.Match[str]", token: _Token) -> bytes:
    short, hexadecimal, octal, small, large, unknown = match.groups()
    code = int(small or large or "0", 16)
    is_other_quote = short in ("'", '"') and short != token.text[0]
    if unknown is not None or is_other_quote or code > 0x10FFFF or 0xD800 <= code < 0xE000 or int(octal or "0", 8) > 255:
        raise fault(token.line, "invalid syntax")
    if short is not None:
        return bytes([_SHORT.get(short, ord(short))])
    if small or large:
        return chr(code).encode()
    return bytes([int(hexadecimal, 16) if hexadecimal else int(octal, 8)])


def _character(token: _Token) -> int:
    text = _unquoted(token)
    if len(text) != 1:
        raise fault(token.line, f"malformed character constant: {token.text[:20]}")
    return ord(text)


_INTEGER = re.compile(
    r"([+-]?)(?:(0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO](?:_?[0-7])+)|(0(?:_?[0-7])+)|(0|[1-9](?:_?[0-9])*))"
)
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_MAX_DIGITS = 40


def _number(token: _Token) -> int | float:
    text = token.text
    if len(text) <= _MAX_DIGITS:
        if match := _INTEGER.fullmatch(text):
            sign, prefixed, octal, decimal = match.groups()
            value = int(prefixed, 0) if prefixed else int(octal, 8) if octal else int(decimal)
            value = -value if sign == "-" else value
            if not -(2**63) <= value < 2**63:
                raise fault(token.line, f"{text} overflows int")
            return value
        if _FLOAT.fullmatch(text) and abs(number := float(text)) < float("inf"):
            return number if any(mark in text for mark in ".eE") else int(number)
    raise fault(token.line, f"bad number syntax: {text[:20]!r}")
