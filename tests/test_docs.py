"""The documentation, held against the code: the reference is generated, shown commands exist, links lead somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest

from corral.cli.app import root
from corral.core.records import Scope
from corral.core.scopes import SCOPE_MEANINGS
from tooling import tool_module

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "newsfragments").glob("*.md")])
#: Commands that are planned; only the page that says what is not built may name them.
PLANNED = ("corral hub backup",)


def test_reference_is_what_the_code_says() -> None:
    assert (ROOT / "docs/reference.md").read_text() == tool_module("make_reference").page(), "→ make reference"


def test_scopes_are_told_in_the_words_of_commands_and_pages() -> None:
    assert set(SCOPE_MEANINGS) == set(Scope)
    page = (ROOT / "docs/concepts.md").read_text().splitlines()
    assert [line for line in page if line.startswith(tuple(f"| `{scope}` |" for scope in Scope))] == [
        f"| `{scope}` | {meaning} |" for scope, meaning in SCOPE_MEANINGS.items()
    ]


def shown_commands(page: Path) -> list[str]:
    """`corral …` in code blocks and code spans, one per command."""
    text = page.read_text()
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(corral [^`]+)`", text)
    found = []
    for line in lines:
        found += [match[0] for match in re.finditer(r"(?:(?<=^)|(?<=\$ )|(?<=\$\())corral [a-z][^)#<|]*", line)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_corral_command_shown_exists_with_its_options(page: Path) -> None:
    for shown in shown_commands(page):
        words = shlex.split(shown.replace("…", "").replace("[", "").replace("]", ""))[1:]
        if not (shown.startswith(PLANNED) and page.name in ("status.md", "README.md")):
            assert_exists(words, shown)


def assert_exists(words: list[str], shown: str) -> None:
    """Follow the words through the groups, then check each option."""
    command: click.Command = root
    rest = list(words)
    while isinstance(command, click.Group) and rest:
        # `add|list` in a table means either; the first stands for both.
        found = command.get_command(click.Context(command), rest[0].split("|")[0])
        assert found is not None, f"{shown!r}: there is no {rest[0]!r}"
        command = found
        rest.pop(0)
    known = {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}
    unknown = {word.split("=")[0] for word in rest if word.startswith("-")} - known
    assert not unknown, f"{shown!r}: no option {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_shown_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = set(re.findall(r"(?:^\s*|`|\$ |&& )make ([a-z]+)", page.read_text(), flags=re.MULTILINE))
    assert shown <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_of_ours_that_is_named_exists(page: Path) -> None:
    ours = {"CORRAL_TEST_MODEL", "CORRAL_TEST_SCREENSHOTS", "CORRAL_TEST_OLLAMA", "CORRAL_FORBID_SKIPS", "CORRAL_TEST_RECORD"}
    named = set(re.findall(r"\bCORRAL_[A-Z_]+\b", page.read_text()))
    assert named <= tool_module("make_reference").variables() | ours


def test_readme_opens_with_the_two_commands() -> None:
    commands = re.findall(r"```sh\n\s*(make \w+)", (ROOT / "README.md").read_text())
    assert commands == ["make up", "make test"]
