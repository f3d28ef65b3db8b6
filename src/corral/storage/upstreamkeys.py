"""The API keys that upstream servers want of this hub, in one private file: base address -> key."""

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from corral.storage.locks import held_alone
from corral.storage.secretfile import read_private, write_private
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret

_log = logging.getLogger("corral.hub")


class UpstreamKeys:
    """path: need not exist. The file is looked at for every request and read when it has changed, so what an administration
    command writes counts from the next request on. Blocks for as long as one `stat` takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, Secret] = {}

    def of(self, base_url: str) -> Secret | None:
        """What a server wants to hear. base_url: without a slash at its end. Raises: upstream_failed when the file is there and
        cannot be used; the log says why, and what mends it."""
        try:
            state = self._path.stat()
        except FileNotFoundError:
            return None
        seen = state.st_ino, state.st_size, state.st_mtime_ns
        if seen != self._seen:
            try:
                self._keys = self._read()
            except CorralError as error:
                _log.warning("%s", error.message)
                raise CorralError(
                    "upstream_failed", "what this model's server wants to hear cannot be read; tell its operator"
                ) from error
            self._seen = seen
        return self._keys.get(base_url)

    def put(self, base_url: str, key: Secret) -> None:
        """Keep a key. Raises: invalid, conflict while another command changes them."""
        with self._changing() as keys:
            keys[base_url] = key

    def keep_only(self, base_urls: Collection[str]) -> None:
        """Forget the keys of all other servers. Raises: invalid, conflict while another command changes them."""
        if self._path.exists():
            with self._changing() as keys:
                for base_url in keys.keys() - base_urls:
                    del keys[base_url]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Secret]]:
        with held_alone(self._path.with_suffix(".lock"), otherwise="another command is changing the keys of upstreams"):
            keys = self._read()
            yield keys
            write_private(self._path, msgspec.json.encode({url: key.reveal() for url, key in keys.items()}))

    def _read(self) -> dict[str, Secret]:
        content = read_private(self._path)
        if content is None:
            return {}
        try:
            kept = msgspec.json.decode(content, type=dict[str, str])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            mend = "remove it, and give its keys again: corral hub host … --upstream-key-stdin"
            raise CorralError("invalid", f"{self._path} is damaged → {mend}") from error
        return {url: Secret(key) for url, key in kept.items()}
