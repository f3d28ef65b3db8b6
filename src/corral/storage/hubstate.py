"""Small files beside the device key: which hub is used and on what terms, and the desktop's cloud switch.

```
~/.ollama/
├── corral.json    ours: {"hub": "<url>", "hubs": {"<url>": {"signature": "corral-v1" | "stock", "public_url": "<url>"}}}
└── server.json    Ollama's: {"disable_ollama_cloud": true}
```

`corral.json` remembers that a hub agreed on the stronger signature. Losing that silently would be a downgrade, so a file that
cannot be read is an error and never an empty memory. Both the CLI and a running local server write it: each write reads the file
anew and replaces it in one step. Members that this version does not know are kept.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corral.core.ports import HubTerms
from corral.storage.secretfile import read_private, write_private
from corral.wire.errors import CorralError

_DAMAGED = "~/.ollama/{} is damaged: {} → repair it, or remove it and run `corral signin` again"
_MAX_BYTES = 1024 * 1024


class HubStateFile:
    """The `HubMemory` in `corral.json`. path: the file; its folder is created 0700 when missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._state: dict[str, Any] = {}

    def hub(self) -> str:
        """The base URL saved by the last sign-in, or empty. Raises: invalid."""
        hub = self._load().get("hub", "")
        if not isinstance(hub, str):
            raise self._damaged("`hub` is not a text")
        return hub

    def choose_hub(self, hub: str) -> None:
        """Save the hub that commands and the local server use from now on."""

        def choose(state: dict[str, Any]) -> None:
            state["hub"] = hub

        self._change(choose)

    def terms(self, hub: str) -> HubTerms | None:
        """What was agreed with a hub, or None. Raises: invalid."""
        kept = self._hubs(self._load()).get(hub)
        if kept is None:
            return None
        if not isinstance(kept, dict) or not isinstance(kept.get("signature"), str):
            raise self._damaged("a hub's entry has no `signature`")
        public_url = kept.get("public_url", hub)
        if not isinstance(public_url, str):
            raise self._damaged("a hub's `public_url` is not a text")
        return HubTerms(signature=kept["signature"], public_url=public_url)

    def keep_terms(self, hub: str, terms: HubTerms) -> None:
        """Remember, or replace, what was agreed with a hub."""

        def keep(state: dict[str, Any]) -> None:
            hubs = state.setdefault("hubs", {})
            before = hubs.get(hub)
            entry = before if isinstance(before, dict) else {}
            hubs[hub] = {**entry, "signature": terms.signature, "public_url": terms.public_url}

        self._change(keep)

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        state = self._read()
        self._hubs(state)
        change(state)
        write_private(self._path, json.dumps(state, indent=2).encode() + b"\n")
        self._seen = None

    def _hubs(self, state: dict[str, Any]) -> dict[str, Any]:
        hubs = state.get("hubs", {})
        if not isinstance(hubs, dict):
            raise self._damaged("`hubs` is not an object")
        return hubs

    def _load(self) -> dict[str, Any]:
        """The state, read again only when the file was replaced or written."""
        seen = _signature(self._path)
        if seen is None or seen != self._seen:
            self._state = self._read()
            self._seen = seen
        return self._state

    def _read(self) -> dict[str, Any]:
        content = read_private(self._path, max_bytes=_MAX_BYTES)
        if content is None:
            return {}
        try:
            return _parse_object(content)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> CorralError:
        return CorralError("invalid", _DAMAGED.format(self._path.name, reason))


def is_cloud_off(path: Path) -> bool:
    """Whether `server.json` switches the cloud off. Raises: invalid for a damaged file: the switch may be in it, so a guess could
    send prompts where they must not go."""
    try:
        return _read_object(path).get("disable_ollama_cloud") is True
    except ValueError as error:
        raise CorralError("invalid", f"~/.ollama/{path.name} is damaged: {error} → repair or remove it") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that others may write, empty when there is no file. Raises: ValueError with what is wrong."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(error.strerror or "it cannot be read") from error
    return _parse_object(text)


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
