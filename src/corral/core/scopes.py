"""The scopes of a credential, each with what it allows: the one vocabulary of API, commands and pages.

Names only and no imports of ours, because commands read them before they know whether they will do anything.
"""

from collections.abc import Collection, Mapping
from typing import Final

#: The name of a core.records.Scope -> what a credential with it may do, in the order in which scopes are shown.
SCOPE_MEANINGS: Final[Mapping[str, str]] = {
    "inference": "run hosted models and search the web",
    "models:pull": "pull models that are yours or shared with you",
    "models:push": "push models, and delete yours",
    "keys": "manage your API keys and devices",
}


def format_scope_names(scopes: Collection[str]) -> str:
    """`inference, models:pull`, in the order of the vocabulary; names it does not know come last, as of a newer hub."""
    known = [name for name in SCOPE_MEANINGS if name in scopes]
    return ", ".join([*known, *sorted(set(scopes) - SCOPE_MEANINGS.keys())]) or "nothing"
