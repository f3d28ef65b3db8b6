"""The shape of the code, checked: which room may import which, what a room may not touch and why, and how large things may grow.

Inside a room, cycles are refused. (A fixed order of a room's modules was tried: it has to be kept by hand for every new file and
says nothing that the absence of cycles does not.)
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src/corral"

#: room -> rooms it may import. A new room starts here, with a line in docs/architecture.md that says why.
ALLOWED = {
    "wire": set(),
    "core": {"wire"},
    "serving": {"wire", "core"},
    "hub": {"wire", "core", "serving"},
    "local": {"wire", "core", "serving"},
    "storage": {"wire", "core"},
    "engines": {"wire", "core"},
    "clients": {"wire", "core"},
    "edges": {"wire", "core", "serving", "hub", "local"},
    "cli": {"wire", "core", "clients", "settings", "logs", "main"},
    "settings": {"wire"},
    "logs": set(),
    "main": {"wire", "core", "serving", "hub", "local", "storage", "engines", "clients", "edges", "settings", "logs"},
    "__main__": {"cli"},
}

_PURE = {
    "time": "pass now as an argument",
    "os": "no environment, no files",
    "pathlib": "paths are the adapters' business",
    "socket": "no I/O",
    "asyncio": "code without I/O has no colour",
    "random": "pass random bytes as an argument",
    "secrets": "pass random bytes as an argument",
    "subprocess": "no I/O",
    "aiohttp": "no I/O",
    "starlette": "HTTP is the edges'",
    "sqlalchemy": "SQL is the storage's",
}
_SERVICE = {
    "sqlalchemy": "SQL is the storage's",
    "starlette": "HTTP in is the edges'",
    "aiohttp": "HTTP out goes through a port",
    "subprocess": "processes are the engines'",
    "click": "terminals are the cli's",
}
#: room -> top-level module it may not import -> why.
BANNED = {
    "wire": _PURE,
    "core": _PURE,
    "serving": _SERVICE,
    "hub": _SERVICE,
    "local": _SERVICE,
    "storage": {"starlette": "HTTP in is the edges'", "aiohttp": "storage is not a client", "click": "terminals are the cli's"},
    "engines": {"starlette": "HTTP in is the edges'", "sqlalchemy": "SQL is the storage's", "click": "terminals are the cli's"},
    "clients": {"starlette": "HTTP in is the edges'", "sqlalchemy": "SQL is the storage's", "click": "terminals are the cli's"},
    "edges": {
        "sqlalchemy": "SQL is the storage's",
        "aiohttp": "HTTP out goes through a service",
        "click": "terminals are the cli's",
    },
    "cli": {"sqlalchemy": "SQL is the storage's", "starlette": "HTTP in is the edges'"},
}
MODULE_LINES, FUNCTION_LINES = 900, 80
#: Functions that may exceed the ceiling because they are one table. Say which table.
TABLES: dict[str, str] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def paths() -> dict[str, Path]:
    """Dotted name below `corral` -> file; a package is named without `__init__`."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or "__init__"] = path
    return found


@cache
def nodes(name: str) -> list[ast.AST]:
    """Everything in a module, once for all tests."""
    return list(ast.walk(ast.parse(paths()[name].read_text(), filename=name)))


@cache
def imports(name: str) -> list[tuple[str, int]]:
    """Every imported dotted name with its line, also those inside functions. `from a import b` gives `a.b`."""
    found = []
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write imports in full"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room(name: str) -> str:
    """`hub.accounts` -> `hub`."""
    return name.split(".")[0]


@pytest.mark.parametrize("name", [name for name in paths() if name != "__init__"])
def test_module_imports_only_what_its_room_may(name: str) -> None:
    own, wrong = room(name), []
    for target, line in imports(name):
        parts = target.split(".")
        if parts[0] == "corral" and len(parts) > 1:
            other = parts[1]
            # `from corral import __version__` is a fact about the package, not a room.
            if other not in (own, "__version__") and other not in ALLOWED[own]:
                wrong.append(f"line {line}: {own} may not import {other}")
        elif (why := BANNED.get(own, {}).get(parts[0])) is not None:
            wrong.append(f"line {line}: {own} may not import {parts[0]}: {why}")
    assert not wrong, "\n".join([name, *wrong])


def test_modules_of_one_room_import_each_other_without_cycles() -> None:
    names = paths().keys()
    needs = {name: {_module_of(target, names) for target, _ in imports(name)} - {"", name} for name in names}
    needs = {name: {other for other in others if room(other) == room(name)} for name, others in needs.items()}
    while free := [name for name, others in needs.items() if not others]:
        needs = {name: others.difference(free) for name, others in needs.items() if name not in free}
    assert not needs, f"these import each other in a ring: {needs}"


def _module_of(target: str, names: object) -> str:
    """The longest prefix of an imported name that is a module of ours, packages' own `__init__` aside."""
    parts = target.split(".")[1:] if target.startswith("corral.") else []
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in candidates if name in names and name != room(name)), "")  # type: ignore[operator]


def test_modules_and_functions_stay_below_their_ceilings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in paths().items()}
    functions = {f"{name}.{node.name}": length for name in paths() for node, length in _functions(name)}
    with capsys.disabled():
        for title, sizes in (("modules", lines), ("functions", functions)):
            largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
            print(f"\nlargest {title}: " + ", ".join(f"{name} {size}" for name, size in largest), end="")
    assert not {name: size for name, size in lines.items() if size > MODULE_LINES}
    assert not {name: size for name, size in functions.items() if size > FUNCTION_LINES and name not in TABLES}


def _functions(name: str) -> Iterator[tuple[Function, int]]:
    for node in nodes(name):
        if isinstance(node, Function):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def test_environment_is_read_only_by_settings() -> None:
    readers = [
        found for attribute in ("environ", "getenv") for found in _uses(attribute, of="os") if not found.startswith("cli.entry ")
    ]
    assert not readers, f"settings.py turns the mapping that cli.entry hands it into values; nobody else reads it: {readers}"


def test_t111_nothing_rebuilds_a_url_from_the_host_header() -> None:
    users = _uses("url", of="request") + _uses("base_url", of="request")
    assert not users, f"Host is the caller's choice: use facts_of(request).target and the configured public URL: {users}"


def _uses(attribute: str, *, of: str) -> list[str]:
    return [
        f"{name} line {node.lineno}"
        for name in paths()
        for node in nodes(name)
        if isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.value, ast.Name) and node.value.id == of
    ]
