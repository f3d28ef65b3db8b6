"""What the unmodified Ollama client puts on the wire when it pushes and pulls, and what it does with the answers.

Written from the description of its behaviour (server/{upload,download,images,auth}.go and x/transfer at fb30760), not from its
code: the requests are made byte by byte, so that a change of our server that the real client would stumble over fails here too.
Nothing of Corral is used. Its peculiarities are kept: the challenge is parsed by looking for `key=`, the realm's host must be
the very text of the request's host, redirects are judged by host name, part requests carry no Authorization.
"""

import base64
import hashlib
import http.client
import json
import os
import re
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit, urlunsplit

from nacl.signing import SigningKey

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
#: The header that every control request carries.
USER_AGENT = "ollama/0.33.0 (amd64 linux) Go/go1.26.0"
#: base64 of the hex text of SHA-256 of nothing.
_NOTHING = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()
_PIECE = 256 * 1024
_PART_MIN, _PART_MAX, _PARTS = 100_000_000, 1_000_000_000, 16


class Refused(AssertionError):
    """The client gives up, with what it would print."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer. headers: lower-case names, of repeated ones the first, as Go's Header.Get gives it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    @property
    def errors(self) -> list[dict[str, str]]:
        """The members of an OCI error body."""
        return list(json.loads(self.body)["errors"])


@dataclass(slots=True)
class DeviceKey:
    """An id_ed25519."""

    private: SigningKey

    @property
    def blob(self) -> str:
        """The second field of the public key file."""
        raw = b"\0\0\0\x0bssh-ed25519\0\0\0 " + bytes(self.private.verify_key)
        return base64.b64encode(raw).decode()

    @property
    def authorized(self) -> str:
        """A line of the public key file."""
        return f"ssh-ed25519 {self.blob}"

    def header(self, message: str) -> str:
        """The Authorization value: no scheme word."""
        return f"{self.blob}:{base64.b64encode(self.private.sign(message.encode()).signature).decode()}"


def parts_of(size: int) -> list[tuple[int, int]]:
    """(offset, length) of the parts of a blob."""
    part = min(max(size // _PARTS, _PART_MIN), _PART_MAX)
    return [(offset, min(part, size - offset)) for offset in range(0, size, part)]


def send(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    cut_after: int | None = None,
    wants_body: bool = True,
) -> Reply:
    """One request on a connection of its own. cut_after: close the connection once so many bytes of the body are sent."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", parts.netloc)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None and "Content-Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        if "Range" not in headers:
            connection.putheader("Accept-Encoding", "gzip")
        connection.endheaders()
        if body:
            _send_body(connection, body if cut_after is None else body[:cut_after])
            if cut_after is not None:
                raise ConnectionAbortedError
        response = connection.getresponse()
        got: dict[str, str] = {}
        for name, value in response.getheaders():
            got.setdefault(name.lower(), value)
        return Reply(status=response.status, headers=got, body=response.read() if wants_body else b"", url=url)
    finally:
        connection.close()


def _send_body(connection: http.client.HTTPConnection, body: bytes) -> None:
    """Send until it is sent or an answer arrives: Go reads while it writes, and stops writing when it is answered."""
    for start in range(0, len(body), _PIECE):
        if select.select([connection.sock], [], [], 0)[0]:
            return
        connection.send(body[start : start + _PIECE])


def go_query(pairs: list[tuple[str, str]]) -> str:
    """A query as Go's url.Values encodes it: sorted by key."""
    return urlencode(
        sorted(pairs, key=lambda pair: pair[0]), quote_via=lambda text, *_: quote(text, safe="~").replace("%20", "+")
    )


def challenge_value(header: str, key: str) -> str:
    """As the client's parser reads a challenge: the first `key=` anywhere, one character skipped, up to a `"` that a comma or
    the end follows."""
    start = header.find(f"{key}=")
    if start < 0:
        return ""
    start += len(key) + 2
    end = start
    while end < len(header):
        if header[end] == '"' and (end + 1 >= len(header) or header[end + 1] == ","):
            break
        end += 1
    return header[start:end]


@dataclass(slots=True)
class StockOllama:
    """One `ollama push` or `ollama pull` of a process with a device key. base: `http://host:port`. token: kept as the client
    keeps it, for one operation. log: (method, target, status) of everything that was sent. pause: what sleeping is."""

    base: str
    key: DeviceKey
    token: str = ""
    log: list[tuple[str, str, int]] = field(default_factory=list)
    pause: Callable[[float], None] = lambda _: None

    # ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def once(self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> Reply:
        """One request, with the token if there is one."""
        fields = {"User-Agent": USER_AGENT, **(headers or {})}
        if self.token:
            fields["Authorization"] = f"Bearer {self.token}"
        reply = send(method, url, fields, body)
        self.log.append((method, url.removeprefix(self.base), reply.status))
        return reply

    def control(self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> Reply:
        """A control request: two tries, a token after a 401. Raises: Refused."""
        for _ in range(2):
            reply = self.followed(method, url, headers, body)
            if reply.status == 401:
                self.authorize(reply, url)
                continue
            if reply.status == 404:
                raise Refused("file does not exist")
            if reply.status >= 400:
                raise Refused(f"{reply.status}: {reply.body.decode()}")
            return reply
        raise Refused("unauthorized: access denied")

    def followed(self, method: str, url: str, headers: Mapping[str, str] | None, body: bytes | None) -> Reply:
        """As Go's client: redirects of GET and HEAD are followed, ten of them."""
        for _ in range(11):
            reply = self.once(method, url, headers, body)
            if reply.status not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
                return reply
            url = urljoin(url, reply.headers["location"])
        raise Refused("stopped after 10 redirects")

    def authorize(self, reply: Reply, url: str) -> None:
        """Fetch a token as the challenge says. Raises: Refused."""
        header = reply.headers.get("www-authenticate", "").removeprefix("Bearer ")
        realm, service, scope = (challenge_value(header, key) for key in ("realm", "service", "scope"))
        parts = urlsplit(realm)
        if parts.netloc != urlsplit(url).netloc:
            raise Refused(f'realm host "{parts.netloc}" does not match original host "{urlsplit(url).netloc}"')
        nonce = base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")
        pairs = [*parse_qsl(parts.query), ("service", service), *(("scope", word) for word in scope.split(" "))]
        pairs += [("ts", str(int(time.time()))), ("nonce", nonce)]
        target = urlunsplit((parts.scheme, parts.netloc, parts.path, go_query(pairs), ""))
        signed = {"User-Agent": USER_AGENT, "Authorization": self.key.header(f"GET,{target},{_NOTHING}")}
        answer = send("GET", target, signed)
        self.log.append(("GET", target.removeprefix(self.base), answer.status))
        if answer.status >= 400:
            raise Refused(f"{answer.status}: {answer.body.decode()}")
        self.token = json.loads(answer.body)["token"]

    # ── Push ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def push(self, repository: str, tag: str, blobs: list[bytes], manifest: bytes) -> None:
        """Layers in order, the config last, then the manifest. Raises: Refused."""
        for blob in blobs:
            self.upload(repository, blob)
        self.put_manifest(repository, tag, manifest)

    def has(self, repository: str, digest: str) -> bool:
        """The HEAD before an upload. Raises: Refused for what is neither there nor absent."""
        try:
            self.control("HEAD", f"{self.base}/v2/{repository}/blobs/{digest}")
        except Refused as refusal:
            if str(refusal) == "file does not exist":
                return False
            raise
        return True

    def begin(self, repository: str, digest: str, *, source: str = "") -> str:
        """The session's URL; empty for a blob that was mounted."""
        url = f"{self.base}/v2/{repository}/blobs/uploads/"
        if source:
            url += "?" + go_query([("mount", digest), ("from", source)])
        reply = self.control("POST", url, {"Content-Length": "0"})
        location = reply.headers.get("docker-upload-location") or reply.headers.get("location", "")
        if reply.status == 201:
            return ""
        if not urlsplit(location).netloc:
            raise Refused(f'unsupported protocol scheme "" in {location!r}')
        return location

    def upload(self, repository: str, blob: bytes, *, source: str = "") -> None:
        """One blob, part by part. Raises: Refused."""
        digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
        if self.has(repository, digest):
            return
        url = self.begin(repository, digest, source=source)
        if not url:
            return
        sums = hashlib.md5()
        parts = parts_of(len(blob))
        for offset, length in parts:
            piece = blob[offset : offset + length]
            url = self.part(url, piece, offset)
            sums.update(hashlib.md5(piece).digest())
        self.commit(url, digest, f"{sums.hexdigest()}-{len(parts)}")

    def part(self, url: str, piece: bytes, offset: int) -> str:
        """PATCH until it is taken: six tries of the same URL and range. The next URL."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(piece)),
            "Content-Range": f"{offset}-{offset + len(piece) - 1}",
            "X-Redirect-Uploads": "1",
        }
        for attempt in range(6):
            try:
                reply = self.once("PATCH", url, headers, piece)
            except OSError:
                self.pause(2**attempt)
                continue
            location = reply.headers.get("docker-upload-location") or reply.headers.get("location", "")
            if reply.status == 307:
                put = {key: headers[key] for key in ("Content-Type", "Content-Length")}
                target = urljoin(url, reply.headers["location"])
                assert send("PUT", target, {"User-Agent": USER_AGENT, **put}, piece).status < 400
                return location
            if reply.status == 401:
                self.authorize(reply, url)
            if reply.status >= 400:
                self.pause(2**attempt)
                continue
            return location
        raise Refused("max retries exceeded")

    def commit(self, url: str, digest: str, etag: str) -> Reply:
        """The PUT that ends an upload: six tries."""
        parts = urlsplit(url)
        query = go_query([*parse_qsl(parts.query, keep_blank_values=True), ("digest", digest), ("etag", etag)])
        target = urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))
        headers = {"Content-Type": "application/octet-stream", "Content-Length": "0"}
        for attempt in range(6):
            try:
                return self.control("PUT", target, headers)
            except (Refused, OSError):
                self.pause(2**attempt)
        raise Refused("max retries exceeded")

    def put_manifest(self, repository: str, tag: str, manifest: bytes) -> Reply:
        """The manifest, compact and without a newline at its end."""
        url = f"{self.base}/v2/{repository}/manifests/{tag}"
        return self.control("PUT", url, {"Content-Type": MANIFEST_TYPE}, manifest)

    # ── Pull ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pull(self, repository: str, tag: str) -> tuple[bytes, dict[str, bytes]]:
        """The manifest's bytes, and the blobs by digest. Raises: Refused, also for content with another digest."""
        url = f"{self.base}/v2/{repository}/manifests/{tag}"
        body = self.control("GET", url, {"Accept": MANIFEST_TYPE}).body
        document = json.loads(body)
        layers = [*(document["layers"] or []), *([document["config"]] if document["config"].get("digest") else [])]
        return body, {layer["digest"]: self.fetch(repository, layer["digest"]) for layer in layers}

    def fetch(self, repository: str, digest: str) -> bytes:
        """One blob: its length, its direct URL, and its parts from there without Authorization."""
        url = f"{self.base}/v2/{repository}/blobs/{digest}"
        size = int(self.control("HEAD", url).headers.get("content-length", "0"))
        direct = self.direct_url(url)
        content = b"".join(self.ranged(direct, offset, length) for offset, length in parts_of(size))
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise Refused(f"digest mismatch, file must be downloaded again: want {digest}")
        return content

    def direct_url(self, url: str) -> str:
        """Where parts are fetched: the Location of a 200, or of a 307 to another host name. Raises: Refused."""
        here = urlsplit(url).hostname
        for _ in range(11):
            reply = self.once("GET", url)
            if reply.status == 401:
                self.authorize(reply, url)
                continue
            if reply.status not in (200, 307):
                raise Refused(f"unexpected status code {reply.status}")
            if "location" not in reply.headers:
                raise Refused("http: no Location header in response")
            target = urljoin(url, reply.headers["location"])
            if reply.status == 200 or urlsplit(target).hostname != here:
                return target
            url = target
        raise Refused("too many redirects")

    def ranged(self, direct: str, offset: int, length: int) -> bytes:
        """A part: redirects followed, the status not looked at, the first bytes of whatever comes."""
        headers = {"User-Agent": "Go-http-client/1.1", "Range": f"bytes={offset}-{offset + length - 1}"}
        for _ in range(10):
            reply = send("GET", direct, headers)
            if reply.status not in (301, 302, 303, 307, 308):
                return reply.body[:length]
            direct = urljoin(direct, reply.headers["location"])
        raise Refused("stopped after 10 redirects")


def model_of(*layers: bytes, **config: str) -> tuple[list[bytes], bytes]:
    """(blobs with the config last, manifest) of a model, as `ollama create` writes them and `push` sends them."""
    described = json.dumps({"model_format": "gguf", "architecture": "amd64", "os": "linux", **config}).encode() + b"\n"

    def entry(content: bytes, kind: str) -> dict[str, object]:
        return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}

    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": entry(described, "application/vnd.docker.container.image.v1+json"),
        "layers": [entry(layer, "application/vnd.ollama.image.model") for layer in layers],
    }
    return [*layers, described], json.dumps(document, separators=(",", ":")).encode()


def is_absolute(url: str) -> bool:
    """Whether Go would take it for the URL of a request."""
    return re.match(r"https?://[^/]+/", url) is not None
