"""Which entry of a table a path leads to. What an entry is, and who may use it, is none of this module's business."""

import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from starlette.routing import compile_path

T = TypeVar("T")


class PathTable(Generic[T]):
    """Paths with their entries. A path may hold `{name}` and `{name:path}`; one without goes before those with."""

    def __init__(self, entries: Mapping[str, T]) -> None:
        self._exact: dict[str, T] = {}
        self._patterns: list[tuple[re.Pattern[str], Mapping[str, Any], T]] = []
        for path, entry in entries.items():
            if "{" in path:
                pattern, _, convertors = compile_path(path)
                self._patterns.append((pattern, convertors, entry))
            else:
                self._exact[path] = entry

    def find(self, path: str) -> tuple[T, dict[str, Any]] | None:
        """(entry, what the path holds for it)."""
        entry = self._exact.get(path)
        if entry is not None:
            return entry, {}
        for pattern, convertors, candidate in self._patterns:
            if match := pattern.match(path):
                return candidate, {name: convertors[name].convert(text) for name, text in match.groupdict().items()}
        return None

    def without_slash(self, path: str) -> T | None:
        """The entry that only a slash at the path's end keeps it from."""
        if len(path) < 2 or not path.endswith("/") or self.find(path) is not None:
            return None
        found = self.find(path[:-1])
        return None if found is None else found[0]
