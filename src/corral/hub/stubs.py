"""Cloud tags: what `pull NAME:TAG-cloud` installs, a manifest that says only where the model runs.

Nothing of it is stored. A stub follows from what is hosted at the moment, always with the same bytes, so that its digests can be
asked for as well. Source: ollama types/model/config.go, server/create.go (remote models), fb30760.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from urllib.parse import urlsplit

from corral.core.ports import Clock, HostedStore
from corral.core.records import Capability, HostedModel
from corral.core.registry import StoredManifest
from corral.hub.hosting import shown_model
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE, Layer, Manifest, ModelConfig, format_config, format_manifest
from corral.wire.names import DEFAULT_TAG, Digest, parse_name
from corral.wire.repositories import RepositoryName, is_reserved_tag

#: How old what is known of the stubs' digests may be. Whoever asks for a digest has fetched the tag before.
_KNOWN_FOR = timedelta(seconds=30)
_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stub:
    """A cloud tag's manifest and the one blob that it names."""

    hosted: HostedModel
    manifest: StoredManifest
    config: bytes
    config_digest: Digest


def cloud_stub(hosted: HostedModel, public_url: str) -> Stub:
    """The stub of a hosted model. public_url: of the hub, without trailing slash."""
    model = shown_model(hosted)
    details = model.details
    config = ModelConfig(
        model_family=details.family,
        model_families=details.families or ((details.family,) if details.family else ()),
        model_type=details.parameter_size,
        file_type=details.quantization_level,
        remote_host=with_port(public_url),
        remote_model=hosted.name.removesuffix(f":{DEFAULT_TAG}"),
        capabilities=tuple(str(capability) for capability in Capability if capability in model.capabilities),
        context_length=details.context_length or 0,
        embedding_length=details.embedding_length or 0,
    )
    config_body = format_config(config, ())
    config_digest = Digest(sha256(config_body).hexdigest())
    layer = Layer(media_type=CONFIG_TYPE, digest=config_digest, size_bytes=len(config_body))
    body = format_manifest(Manifest(config=layer, layers=()))
    manifest = StoredManifest(digest=Digest(sha256(body).hexdigest()), media_type=MANIFEST_TYPE, body=body, is_stub=True)
    return Stub(hosted=hosted, manifest=manifest, config=config_body, config_digest=config_digest)


def with_port(url: str) -> str:
    """A URL with its port written out: stock clients put :11434 behind a remote host that has none."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}"


class Stubs:
    """The stubs of everything that is hosted, for anybody; whoever serves one asks who may use the model."""

    def __init__(self, hosted: HostedStore, *, public_url: str, clock: Clock) -> None:
        self._hosted = hosted
        self._public_url = public_url
        self._clock = clock
        # (repository in lower case, digest) -> the name of the hosted model.
        self._names: dict[tuple[RepositoryName, Digest], str] = {}
        self._read_at: datetime | None = None

    async def tagged(self, name: RepositoryName, tag: str) -> Stub | None:
        """The stub that a tag stands for: `TAG-cloud`, or `cloud` for the latest."""
        base = tag[: -len("-cloud")] if tag.lower().endswith("-cloud") else DEFAULT_TAG
        # Models are hosted under names of two parts; with a third, the first would be read as a registry.
        if not is_reserved_tag(tag) or tag.lower() == "local" or "/" in name.name:
            return None
        try:
            wanted = parse_name(f"{name}:{base}").short
        except CorralError:
            return None
        hosted = await self._hosted.get(wanted)
        if hosted is None:
            return None
        stub = cloud_stub(hosted, self._public_url)
        # Its config is asked for next, and by its digest alone.
        self._names.update(_digests_of(stub))
        return stub

    async def holding(self, name: RepositoryName, digest: Digest) -> Stub | None:
        """The stub of that repository whose manifest or config has that digest."""
        now = self._clock.now()
        if self._read_at is None or not timedelta(0) <= now - self._read_at < _KNOWN_FOR:
            # Taken as read before it is: else all that ask meanwhile would read it again.
            self._read_at = now
            self._names = await self._read()
        hosted_name = self._names.get((name.key, digest))
        hosted = await self._hosted.get(hosted_name) if hosted_name else None
        stub = None if hosted is None else cloud_stub(hosted, self._public_url)
        return stub if stub is not None and digest in (stub.manifest.digest, stub.config_digest) else None

    async def _read(self) -> dict[tuple[RepositoryName, Digest], str]:
        names = {}
        for hosted in await self._hosted.list():
            names.update(_digests_of(cloud_stub(hosted, self._public_url)))
        return names


def _digests_of(stub: Stub) -> dict[tuple[RepositoryName, Digest], str]:
    key = parse_name(stub.hosted.name).key
    repository = RepositoryName(key.namespace, key.model)
    return {(repository, digest): stub.hosted.name for digest in (stub.manifest.digest, stub.config_digest)}
