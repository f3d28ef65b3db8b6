"""Scopes on the command line: by their names, or by the last word of one."""

from collections.abc import Callable, Sequence
from typing import Final

import click

from corral.cli.context import Decorated, Failed
from corral.core.scopes import SCOPE_MEANINGS

_BY_LAST_WORD: Final = {name.rpartition(":")[2]: name for name in SCOPE_MEANINGS}
#: What the help of a command that takes scopes ends with. click keeps the lines of a paragraph that begins with \b.
SCOPES_EPILOG: Final = "\b\nScopes:\n" + "\n".join(f"  {name.ljust(12)} {what}" for name, what in SCOPE_MEANINGS.items())


def scope_names(words: Sequence[str]) -> list[str]:
    """The names of scopes that were given one by one or with commas, each once. `push` is taken for `models:push`.
    Raises: Failed naming the valid ones."""
    names: list[str] = []
    for word in (part for words_of in words for part in words_of.split(",")):
        name = word.strip().lower()
        name = _BY_LAST_WORD.get(name, name)
        if name not in SCOPE_MEANINGS:
            raise Failed(f'there is no scope "{word}"', f"scopes are {', '.join(SCOPE_MEANINGS)}", status=2)
        if name not in names:
            names.append(name)
    return names


def scope_option(default: Sequence[str]) -> Callable[[Decorated], Decorated]:
    """`--scope`, as often as wanted. default: what it is without, for its help; the command's epilog is SCOPES_EPILOG."""
    text = f"What it may do, of these; repeatable. [default: {', '.join(default)}]"
    return click.option("--scope", "scopes", multiple=True, metavar="SCOPE", help=text, shell_complete=shown_scopes)


def shown_scopes(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """What a shell completes where a scope is given: names, and short ones once begun."""
    words = dict.fromkeys([*SCOPE_MEANINGS, *_BY_LAST_WORD]) if incomplete else SCOPE_MEANINGS
    return [word for word in words if word.startswith(incomplete)]
