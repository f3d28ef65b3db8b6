"""What a credential may do, in the words people use for it: `push` is `models:push`."""

from collections.abc import Callable, Collection, Sequence
from typing import Final

import click

from corral.cli.context import Decorated, Failed

#: word -> the hub's own name of the scope.
WORDS: Final = {"inference": "inference", "pull": "models:pull", "push": "models:push", "keys": "keys"}
#: The hub's name of a scope -> the word that its pages have for it.
PAGE_WORDS: Final = {"inference": "run", "models:pull": "pull", "models:push": "push", "keys": "keys"}


def page_words(scopes: Collection[str]) -> str:
    """Scopes as the hub's pages list them: `run, pull`."""
    known = [word for name, word in PAGE_WORDS.items() if name in scopes]
    return ", ".join([*known, *sorted(set(scopes) - set(PAGE_WORDS))]) or "nothing"


def scope_names(words: Sequence[str]) -> list[str]:
    """The hub's names of scopes that were given one by one or with commas, each once. Raises: Failed naming the valid ones."""
    names: list[str] = []
    for word in (part for words_of in words for part in words_of.split(",")):
        name = WORDS.get(word.strip().lower(), word.strip().lower())
        if name not in WORDS.values():
            raise Failed(f'there is no scope "{word}"', f"scopes are {', '.join(WORDS)}", status=2)
        if name not in names:
            names.append(name)
    return names


def scope_option(text: str) -> Callable[[Decorated], Decorated]:
    """`--scope`, as often as wanted. text: its help."""
    return click.option("--scope", "scopes", multiple=True, metavar="SCOPE", help=text, shell_complete=shown_scopes)


def shown_scopes(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """What a shell completes where a scope is given."""
    return [word for word in WORDS if word.startswith(incomplete)]
