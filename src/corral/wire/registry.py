"""The registry protocol's texts: ranges, scopes and challenges, manifests of any kind, part sizes.

A manifest is kept as the bytes it came as; what is parsed here is read from it and never written back. Both sides of the protocol
live here: what a hub receives and answers, and what a client reads and asks. Sources: ollama server/{auth,images,upload,
download}.go, fb30760; distribution-spec 1.1; distribution docs/content/spec/auth.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import md5
from typing import NoReturn, Protocol
from urllib.parse import parse_qsl, quote_plus, urlsplit, urlunsplit

import msgspec

from corral.wire.documents import check_depth, convert, parse_object, refuse
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE, MAX_LAYERS, MAX_MANIFEST_BYTES
from corral.wire.names import Digest, parse_content_digest
from corral.wire.repositories import RepositoryName, parse_repository

OCI_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
DOCKER_LIST_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
_IMAGE_TYPES = frozenset({MANIFEST_TYPE, OCI_MANIFEST_TYPE})
_INDEX_TYPES = frozenset({OCI_INDEX_TYPE, DOCKER_LIST_TYPE})
#: Layers of containers that their makers hand out themselves. Source: image-spec 1.0 layer.md; distribution, schema 2.
_NOT_DISTRIBUTED = ("application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign.diff.")

_MAX_SIZE = 2**63 - 1

# ── Ranges and parts ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Forty digits are beyond any size and still quickly turned into a number.
_RANGE = re.compile(r"bytes=([0-9]{0,40})-([0-9]{0,40})", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")

_PARTS = 16
_MIN_PART_BYTES = 100_000_000
_MAX_PART_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes first to last, both included."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """How many bytes that are."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def parse_range(value: str, size_bytes: int) -> ByteRange | None:
    """What a `Range` header asks of a blob of that size, cut at its end; None where the whole is served: several ranges, another
    unit. Raises: range_invalid, with the size in Content-Range."""
    unit, equals, _ = value.partition("=")
    # Several ranges would need a multipart answer, which no client of a registry reads, and which invites a thousand of them.
    if not equals or unit.strip().lower() != "bytes" or "," in value:
        return None
    match = _RANGE.fullmatch(value.strip())
    if match is None or not (match[1] or match[2]):
        _refuse_range(size_bytes)
    if not match[1]:
        return _suffix(int(match[2]), size_bytes)
    first, last = int(match[1]), int(match[2]) if match[2] else size_bytes - 1
    # RFC 9110 would have `500-0` ignored. Stock clients take the first bytes of any body, so the whole would be taken for a part.
    if first >= size_bytes or last < first:
        _refuse_range(size_bytes)
    return ByteRange(first, min(last, size_bytes - 1))


def _suffix(length: int, size_bytes: int) -> ByteRange | None:
    if length == 0:
        _refuse_range(size_bytes)
    # The last bytes of nothing are nothing, which no Content-Range can say.
    return ByteRange(max(0, size_bytes - length), size_bytes - 1) if size_bytes else None


def _refuse_range(size_bytes: int) -> NoReturn:
    raise CorralError("range_invalid", headers={"Content-Range": f"bytes */{size_bytes}"})


def parse_content_range(value: str, length: int | None) -> ByteRange:
    """Where a chunk of an upload belongs: `first-last`, without unit or total. length: its Content-Length, None when chunked.
    Raises: size_invalid when it is malformed or says another length; range_invalid beyond any size."""
    match = _CONTENT_RANGE.fullmatch(value.strip())
    if match is None:
        raise CorralError("size_invalid", "the Content-Range of a chunk is FIRST-LAST, in bytes")
    chunk = ByteRange(int(match[1]), int(match[2]))
    if chunk.last > _MAX_SIZE:
        raise CorralError("range_invalid")
    if chunk.length < 1 or (length is not None and chunk.length != length):
        raise CorralError("size_invalid", f"Content-Range says {chunk}, Content-Length says {length}")
    return chunk


def part_size(size_bytes: int) -> int:
    """How large the parts are in which stock clients move a blob. Source: ollama server/{upload,download}.go."""
    return max(_MIN_PART_BYTES, min(_MAX_PART_BYTES, size_bytes // _PARTS))


def parts(size_bytes: int) -> list[ByteRange]:
    """The parts of a blob in order; what is left over is a part of its own, however small. None for an empty blob."""
    step = part_size(size_bytes)
    return [ByteRange(first, min(first + step, size_bytes) - 1) for first in range(0, size_bytes, step)]


def multipart_etag(md5s: Sequence[bytes]) -> str:
    """`etag` of a commit: of the parts' raw MD5 sums, as S3 makes it. It detects damage and proves nothing."""
    return f"{md5(b''.join(md5s), usedforsecurity=False).hexdigest()}-{len(md5s)}"


# ── Scopes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
#: Repositories one token request can name; a push that mounts names two.
MAX_SCOPES = 50
_ACTIONS = ("pull", "push", "delete")


@dataclass(frozen=True, slots=True)
class ScopeRequest:
    """What a token is asked for. kind: `repository`, the only one there is. actions: of pull, push, delete; never empty."""

    kind: str
    repository: str
    actions: frozenset[str]


def parse_scopes(values: Sequence[str]) -> tuple[ScopeRequest, ...]:
    """Read the `scope` parameters of a token request, repeated or as one list with spaces, each repository once and in order.

    What is no scope of a repository is ignored, as is what exceeds `MAX_SCOPES`: a smaller grant is an answer, not an error.
    `*` stands for every action, since that is what skopeo asks for before it deletes.
    """
    wanted: dict[RepositoryName, tuple[str, frozenset[str]]] = {}
    for text in (text for value in values for text in value.split()):
        scope = _parse_scope(text)
        if scope is None:
            continue
        key = parse_repository(scope.repository).key
        if key not in wanted and len(wanted) == MAX_SCOPES:
            break
        first_spelling, actions = wanted.get(key, (scope.repository, frozenset()))
        wanted[key] = (first_spelling, actions | scope.actions)
    return tuple(ScopeRequest("repository", repository, actions) for repository, actions in wanted.values())


def _parse_scope(text: str) -> ScopeRequest | None:
    # From both ends: in other registries a name may hold a host with a port. Ours never do, so the grammar refuses those.
    kind, _, rest = text.partition(":")
    repository, _, listed = rest.rpartition(":")
    named = listed.split(",")
    actions = frozenset(_ACTIONS) if "*" in named else frozenset(_ACTIONS).intersection(named)
    if kind != "repository" or not actions:
        return None
    try:
        parse_repository(repository)
    except CorralError:
        return None
    return ScopeRequest(kind, repository, actions)


def scope_text(repository: str, actions: Collection[str]) -> str:
    """`repository:NAME:pull,push`, always in that order."""
    return f"repository:{repository}:{','.join(action for action in _ACTIONS if action in actions)}"


# ── Challenges ───────────────────────────────────────────────────────────────────────────────────────────────────────────
_MAX_CHALLENGE = 8192
_MAX_REALM_PARAMETERS = 50
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110's word for a name
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))\s*(?:,|$)', re.ASCII)
_VISIBLE = re.compile(r"[\x21-\x7e]+")


def challenge_header(*, realm: str, service: str, scope: str = "", error: str = "") -> str:
    """The `WWW-Authenticate` of a 401. realm: the token endpoint's URL. scope: as `scope_text` makes it. error:
    `insufficient_scope` or `invalid_token`.

    Ollama finds a value behind the first `key=` anywhere in the header and ends it at a quote before a comma, so a value that
    holds either would be read as something else. Raises: ValueError for such a value, since they all come from ourselves.
    """
    named = {"realm": realm, "service": service, "scope": scope, "error": error}
    given = {key: value for key, value in named.items() if value}
    for key, value in given.items():
        if not value.isascii() or not value.isprintable() or '"' in value or "\\" in value:
            raise ValueError(f"{key} cannot be quoted: {value!r}")
        if any(f"{other}=" in value for other in named):
            raise ValueError(f"{key} would be misread: {value!r}")
    return "Bearer " + ",".join(f'{key}="{value}"' for key, value in given.items())


@dataclass(frozen=True, slots=True)
class Challenge:
    """Where a registry sends its clients for a token. realm: an http or https URL without user, password or fragment; whose host
    it names is for the caller to judge."""

    realm: str
    service: str
    scopes: tuple[str, ...]


def parse_challenge(value: str) -> Challenge:
    """Read the `WWW-Authenticate` header of a registry. Raises: upstream_failed when it is no single Bearer challenge, gives a
    parameter twice (T92), or names a realm that is no plain URL."""
    scheme, _, rest = value.strip().partition(" ")
    if len(value) > _MAX_CHALLENGE or scheme.lower() != "bearer":
        _refuse_challenge("it is no Bearer challenge")
    found: dict[str, str] = {}
    position = 0
    rest = rest.strip()
    while position < len(rest):
        match = _PARAMETER.match(rest, position)
        if match is None:
            _refuse_challenge("it is malformed")
        name = match[1].lower()
        # Two readers would pick different ones, and one of them would sign for a place that the other never checked.
        if name in found:
            _refuse_challenge(f"it gives {name[:40]} twice")
        found[name] = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
        position = match.end()
    _check_realm(found.get("realm", ""))
    return Challenge(found["realm"], found.get("service", ""), tuple(found.get("scope", "").split()))


def _check_realm(realm: str) -> None:
    try:
        url = urlsplit(realm)
        is_plain = bool(url.hostname) and url.scheme in ("http", "https") and "@" not in url.netloc and url.port != 0
        _query_pairs(url.query)
    except ValueError:
        is_plain = False
    if not is_plain or not _VISIBLE.fullmatch(realm) or "\\" in realm or "#" in realm:
        _refuse_challenge("its realm is no plain http or https URL")


def _refuse_challenge(reason: str) -> NoReturn:
    raise CorralError("upstream_failed", f"the registry asks for a token in a way that is not understood: {reason}")


def token_request_url(challenge: Challenge, *, ts: int, nonce: str) -> str:
    """The URL that a stock client asks for a token, as its signature covers it: the realm's own parameters kept, all sorted by
    name. ts: whole seconds since the epoch. nonce: 16 random bytes, base64url without padding."""
    url = urlsplit(challenge.realm)
    pairs = _query_pairs(url.query)
    pairs.append(("service", challenge.service))
    # An empty scope is sent too.
    pairs += [("scope", scope) for scope in challenge.scopes or ("",)]
    pairs += [("ts", str(ts)), ("nonce", nonce)]
    # Go's url.Values.Encode sorts by name and keeps the order of equal names.
    pairs.sort(key=lambda pair: pair[0])
    query = "&".join(f"{_go_escaped(name)}={_go_escaped(text)}" for name, text in pairs)
    return urlunsplit((url.scheme, url.netloc, url.path, query, ""))


def _query_pairs(query: str) -> list[tuple[str, str]]:
    return parse_qsl(query, keep_blank_values=True, errors="surrogateescape", max_num_fields=_MAX_REALM_PARAMETERS)


def _go_escaped(text: str) -> str:
    return quote_plus(text, errors="surrogateescape")


# ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────────────
_MEDIA_NAME = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_MEDIA_TYPE = re.compile(rf"{_MEDIA_NAME}/{_MEDIA_NAME}")
# 12,000 descriptors, each with annotations, URLs and a platform, have 50,000 brackets and 120,000 commas. We count them
# first, because the parser holds up every thread until it is through.
_MAX_BRACKETS, _MAX_COMMAS = 100_000, 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a manifest says of something it refers to. urls: whether it says where else that may be fetched."""

    media_type: str
    digest: Digest
    size_bytes: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    urls: bool = False

    @property
    def is_elsewhere(self) -> bool:
        """Whether it need not be here. URLs alone are not enough: what a page shows or an engine loads is read from the blobs
        that a manifest names, so whoever names one of those must have it (T30, T31)."""
        return self.urls and self.media_type.startswith(_NOT_DISTRIBUTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageManifest:
    """A manifest of any kind. media_type: as it is to be served. config: None where there is none or its digest is empty, as in
    some of Ollama's. layers: in order. manifests: of an index."""

    media_type: str
    artifact_type: str = ""
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    manifests: tuple[Descriptor, ...] = ()
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """What has to be in the repository, each digest once: layers, but for those that are elsewhere, then the config."""
        config = () if self.config is None else (self.config,)
        named = [*(layer for layer in self.layers if not layer.is_elsewhere), *config]
        return tuple({descriptor.digest: descriptor for descriptor in named}.values())

    @property
    def children(self) -> tuple[Descriptor, ...]:
        """The manifests of an index, each digest once."""
        return tuple({descriptor.digest: descriptor for descriptor in self.manifests}.values())

    @property
    def referrer_type(self) -> str:
        """The artifact type in a listing of referrers: its own, else the config's media type, none for an index."""
        return self.artifact_type or (self.config.media_type if self.config else "")

    @property
    def annotations_json(self) -> bytes:
        """The annotations as a listing of referrers repeats them."""
        return msgspec.json.encode(self.annotations)


class _WireDescriptor(msgspec.Struct, rename="camel"):
    media_type: str = ""
    digest: str = ""
    size: int = -1
    artifact_type: str = ""
    annotations: dict[str, str] = {}
    urls: list[str] = []


class _WireImage(msgspec.Struct, rename="camel"):
    schema_version: int = 2
    media_type: str = ""
    artifact_type: str = ""
    config: _WireDescriptor | None = None
    layers: list[_WireDescriptor] | None = None
    #: What the artifact manifest of the first drafts of OCI 1.1 calls its layers.
    blobs: list[_WireDescriptor] | None = None
    manifests: list[_WireDescriptor] | None = None
    subject: _WireDescriptor | None = None
    annotations: dict[str, str] = {}


def parse_image_manifest(body: bytes, content_type: str) -> ImageManifest:
    """Read a manifest of any media type. content_type: the header's value. Raises: manifest_invalid, too_large."""
    is_short = len(body) <= MAX_MANIFEST_BYTES
    if is_short and (body.count(b"{") + body.count(b"[") > _MAX_BRACKETS or body.count(b",") > _MAX_COMMAS):
        _refuse("it holds too many values")
    document = parse_object(body, MAX_MANIFEST_BYTES, "manifest", code="manifest_invalid")
    check_depth(document, "manifest", code="manifest_invalid")
    wire = convert(document, _WireImage, "manifest", code="manifest_invalid")
    if wire.schema_version != 2:
        _refuse(f"schemaVersion is {wire.schema_version}, not 2")
    media_type = _media_type(content_type, wire.media_type)
    _check_kind(media_type, wire)
    if sum(len(listed or ()) for listed in (wire.layers, wire.blobs, wire.manifests)) > MAX_LAYERS:
        _refuse(f"it refers to more than {MAX_LAYERS} blobs and manifests")
    has_config = wire.config is not None and (wire.config.digest or wire.config.size > 0)
    manifest = ImageManifest(
        media_type=media_type,
        artifact_type=wire.artifact_type,
        config=_descriptor(wire.config) if wire.config is not None and has_config else None,
        layers=_descriptors([*(wire.layers or ()), *(wire.blobs or ())]),
        manifests=_descriptors(wire.manifests or ()),
        subject=None if wire.subject is None else _descriptor(wire.subject),
        annotations=wire.annotations,
    )
    _check_sizes(manifest)
    return manifest


def _media_type(content_type: str, own: str) -> str:
    stated = content_type.partition(";")[0].strip()
    media_type = stated or own
    # It becomes a header of every answer with this manifest.
    if not _MEDIA_TYPE.fullmatch(media_type):
        _refuse("its media type is none")
    # Ollama sends whatever it pulled elsewhere under this one Content-Type. Nothing else may be said twice and differently.
    if content_type == MANIFEST_TYPE and own == OCI_MANIFEST_TYPE:
        return own
    if own and own.lower() != media_type.lower():
        _refuse(f"its mediaType is {own[:100]!r}, and its Content-Type is {media_type!r}")
    return media_type


def _check_kind(media_type: str, wire: _WireImage) -> None:
    # One document that is an image to one reader and an index to another has one digest and two meanings (GHSA-qq97-vm5h-rrhg).
    is_image = wire.config is not None or wire.layers is not None or wire.blobs is not None
    if wire.manifests is not None and (is_image or media_type.lower() in _IMAGE_TYPES):
        _refuse("an image has no manifests of its own")
    if is_image and media_type.lower() in _INDEX_TYPES:
        _refuse("an index has no config and no layers")


def _descriptors(listed: Iterable[_WireDescriptor]) -> tuple[Descriptor, ...]:
    return tuple(_descriptor(wire) for wire in listed)


def _descriptor(wire: _WireDescriptor) -> Descriptor:
    if not 0 <= wire.size <= _MAX_SIZE:
        _refuse("a size is missing, negative or beyond 63 bits")
    try:
        digest = parse_content_digest(wire.digest)
    except CorralError as error:
        raise CorralError("manifest_invalid", f"invalid manifest: {error.message}") from error
    return Descriptor(
        media_type=wire.media_type,
        digest=digest,
        size_bytes=wire.size,
        artifact_type=wire.artifact_type,
        annotations=wire.annotations,
        urls=bool(wire.urls),
    )


def _check_sizes(manifest: ImageManifest) -> None:
    sizes: dict[Digest, int] = {}
    for descriptor in (*manifest.blobs, *manifest.layers, *manifest.manifests):
        if sizes.setdefault(descriptor.digest, descriptor.size_bytes) != descriptor.size_bytes:
            _refuse(f"it states two sizes of {descriptor.digest}")


def _refuse(reason: str) -> NoReturn:
    refuse("manifest", reason, code="manifest_invalid")


class ReferrerFacts(Protocol):
    """What a listing tells of a manifest with a subject. annotations: a JSON object."""

    @property
    def digest(self) -> Digest: ...
    @property
    def media_type(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def artifact_type(self) -> str: ...
    @property
    def annotations(self) -> bytes: ...


def referrers_index(referrers: Iterable[ReferrerFacts]) -> bytes:
    """The body of a referrers listing, an OCI index."""
    listed = [_listed(one) for one in referrers]
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX_TYPE, "manifests": listed})


def _listed(referrer: ReferrerFacts) -> dict[str, object]:
    described: dict[str, object] = {
        "mediaType": referrer.media_type,
        "digest": str(referrer.digest),
        "size": referrer.size_bytes,
    }
    if referrer.artifact_type:
        described["artifactType"] = referrer.artifact_type
    if referrer.annotations not in (b"", b"{}"):
        described["annotations"] = msgspec.Raw(referrer.annotations)
    return described
