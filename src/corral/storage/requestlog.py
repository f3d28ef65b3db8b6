"""Requests written to files, for whoever debugs a client: OLLAMA_DEBUG_LOG_REQUESTS.

```
<temporary directory>/corral-request-logs-XXXXXXXX/                        0700
├── 20260822T100000.123456Z-000001_api_chat_body.json                      0600, the body as it came
└── 20260822T100000.123456Z-000001_api_chat_request.sh                     0600, `sh` it to ask again
```

Of the headers only the content type is kept, so no credential is among it. Source: ollama
server/inference_request_log.go, fb30760.
"""

import itertools
import logging
import re
import shlex
import tempfile
import threading
from datetime import datetime
from pathlib import Path

#: What all files of one server may take up; a server that is forgotten in this mode must not fill the disk.
_MAX_BYTES = 1 << 30
#: What the two files of one request take beside its body, as disks count.
_LEAST_BYTES = 8 * 1024

_log = logging.getLogger("corral.server")


class RequestLog:
    """The files of one server. parent: where its directory is made."""

    def __init__(self, parent: Path | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="corral-request-logs-", dir=parent))
        self._numbers = itertools.count(1)
        self._room_bytes = _MAX_BYTES
        self._lock = threading.Lock()

    def note(self, path: str, host: str, content_type: str, body: bytes, *, now: datetime) -> None:
        """Write one POST request down. Blocks. host: of the request's header. A disk that takes nothing is only told of."""
        with self._lock:
            needed = len(body) + _LEAST_BYTES
            if self._room_bytes < needed:
                return
            self._room_bytes -= needed
            number = next(self._numbers)
            if self._room_bytes < _MAX_BYTES // 100:
                _log.warning("no more requests are written to %s: there are enough", self.directory)
                self._room_bytes = 0
        route = re.sub(r"[^A-Za-z0-9]", "_", path.strip("/")) or "root"
        name = f"{now:%Y%m%dT%H%M%S.%fZ}-{number:06d}_{route}"
        url, header = shlex.quote(f"http://{host}{path}"), shlex.quote(f"Content-Type: {content_type}")
        script = (
            '#!/bin/sh\nhere="$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)"\n'
            f'curl --request POST --url {url} --header {header} --data-binary @"$here/{name}_body.json"\n'
        )
        try:
            _write(self.directory / f"{name}_body.json", body)
            _write(self.directory / f"{name}_request.sh", script.encode())
        except OSError as error:
            _log.warning("a request could not be written to %s: %s", self.directory, error.strerror)


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(content)
