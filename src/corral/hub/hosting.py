"""Which hosted models a caller may see, under which names.

What may not be seen is absent, with the same answer as a name that never was: existence is not told. Callers name models with or
without the cloud suffix; listings show base names.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256

from corral.core.ports import HostedStore
from corral.core.records import Capability, HostedModel, Model, ModelDetails, Principal
from corral.wire.names import DEFAULT_NAMESPACE, Digest, Source, parse_name, parse_reference


class Hosting:
    """The hub's hosted models, as far as a caller may see them."""

    def __init__(self, store: HostedStore) -> None:
        self._store = store

    async def list(self, caller: Principal | None) -> Sequence[HostedModel]:
        """What the caller may use; what anybody may, for None."""
        return [hosted for hosted in await self._store.list() if may_use(caller, hosted)]

    async def resolve(self, requested: str, caller: Principal | None) -> HostedModel | None:
        """The model a request names, `NAME-cloud` and `NAME:cloud` included; None when there is none for this caller.
        Raises: bad_request for a malformed name."""
        name = _base_name(requested)
        hosted = await self._store.get(name) if name else None
        return hosted if hosted is not None and may_use(caller, hosted) else None


# Pure, and asked for the same few names by every request.
@lru_cache(maxsize=1024)
def _base_name(requested: str) -> str:
    """The short form of what is asked for, without a cloud suffix; empty for a model that is to be local to whoever asks."""
    reference = parse_reference(requested)
    name = parse_name(reference.base)
    return "" if reference.source is Source.LOCAL else name.short


def may_use(caller: Principal | None, hosted: HostedModel) -> bool:
    """Whether a model exists for a caller: when it is public, or in the caller's namespace; administrators own the library."""
    if hosted.is_public:
        return True
    if caller is None:
        return False
    namespace = parse_name(hosted.name).namespace.casefold()
    return namespace == caller.account.name.casefold() or (namespace == DEFAULT_NAMESPACE and caller.account.is_admin)


def runnable_model(hosted: HostedModel) -> Model:
    """What Inference runs: the hub's own weights, or a stub of the upstream's model."""
    if hosted.model is not None:
        return hosted.model
    return replace(_upstream_facts(hosted), remote_host=hosted.upstream_url, remote_model=hosted.upstream_model)


def shown_model(hosted: HostedModel) -> Model:
    """What listings and show tell: under the name it is offered by, and nothing of where it runs or lies on this machine."""
    if hosted.model is None:
        return _upstream_facts(hosted)
    return replace(hosted.model, name=parse_name(hosted.name), weights=None, projector=None, adapters=(), draft=None)


def _upstream_facts(hosted: HostedModel) -> Model:
    """All that is known of a model at an upstream. It is taken to chat, call tools and see, since nobody can ask it; what it
    cannot do, it refuses itself."""
    return Model(
        name=parse_name(hosted.name),
        digest=Digest(sha256(f"upstream {hosted.name}".encode()).hexdigest()),
        size_bytes=0,
        modified_at=hosted.created_at,
        details=ModelDetails(),
        capabilities=frozenset({Capability.COMPLETION, Capability.TOOLS, Capability.VISION}),
    )
