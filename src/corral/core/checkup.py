"""What `corral doctor` saw, before anybody judges it. Values only: `main.checkup` and `cli.doctor_gather` look,
`cli.doctor_findings` judges.

Nothing here is a secret: of an API key there is no more than listings show.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

#: Who said which hub is used.
HubSource = Literal["--hub", "CORRAL_HUB", "the local server", "the last sign-in", "default"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What an adapter said when it failed. advice: what stood behind its arrow, empty for none."""

    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """The device key of this installation. path: as people write it. fingerprint: empty when there is no usable key; without
    trouble as well, there is no file."""

    path: str
    fingerprint: str = ""
    mode: int = 0
    trouble: Trouble | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsFolder:
    """Where models are installed. owner: an OS user, empty where there is no folder. has_parent: whether it could be made where
    it is missing. free_bytes: of its disk, None where nobody can tell. models: how many are installed."""

    path: str
    owner: str = ""
    is_there: bool = True
    has_parent: bool = True
    is_readable: bool = True
    is_writable: bool = True
    free_bytes: int | None = None
    models: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSeen:
    """What runs models. name: of a program, or of the library inside; what it said of itself."""

    name: str = ""
    trouble: Trouble | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizedSeen:
    """The file of who may use this machine's server. keys: how many lines let somebody in. complaints: a sentence for each
    line that does not, beginning with its number. trouble: why the whole file counts for nothing."""

    path: str
    keys: int = 0
    complaints: tuple[str, ...] = ()
    trouble: Trouble | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a server answered when it was asked who a credential is. status: of HTTP, 0 when nobody answered, which trouble then
    tells. account: empty unless it is somebody's. device_id, device_name: as the hub calls the device that signed, where it does.
    fingerprint: of the key in the link to sign in at; has_link: whether there was one, so that the hub takes the signature and
    does not know the key. message: the server's words. since, scopes: of the device, where the hub lists it. may_run: whether it
    may run models, None where nobody could tell."""

    status: int = 0
    account: str = ""
    device_id: str = ""
    device_name: str = ""
    fingerprint: str = ""
    has_link: bool = False
    message: str = ""
    trouble: Trouble | None = None
    since: datetime | None = None
    scopes: tuple[str, ...] | None = None
    may_run: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSeen:
    """What is at OLLAMA_HOST. is_here: on this machine. is_absent: nothing listens there. status, message: of HTTP when it
    refused. is_let_in: whether it wanted a credential and took ours, took_key: whether that was OLLAMA_API_KEY.
    is_hub: a hub answers there. corral, ollama:
    versions it told. hub: the one it uses, empty where it does not say. cloud_off_by: `env`, `config`, `both`, or empty when it
    passes requests on. user: the OS user who runs it, empty where unknown. standing: who it is at its hub; None when it was not
    asked."""

    url: str
    is_here: bool = True
    is_absent: bool = False
    status: int = 0
    message: str = ""
    is_let_in: bool = False
    took_key: bool = False
    trouble: Trouble | None = None
    is_hub: bool = False
    corral: str = ""
    ollama: str = ""
    hub: str = ""
    cloud_off_by: str = ""
    user: str = ""
    standing: Standing | None = None

    @property
    def is_answering(self) -> bool:
        """Whether it told what it is."""
        return bool(self.corral or self.ollama)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSeen:
    """The hub in use. is_private_line: whether a credential may travel there. is_asked: False where nobody wants it asked.
    is_absent: nothing listens there. is_corral: whether it takes the strong signature. took_ms: of its first answer. proxy: host
    and port on the way, empty for none. clock_offset_s: how far this machine is behind the hub's clock, None where the hub does
    not tell."""

    url: str
    source: HubSource
    is_private_line: bool = True
    is_asked: bool = True
    is_absent: bool = False
    trouble: Trouble | None = None
    is_corral: bool = False
    took_ms: int = 0
    proxy: str = ""
    clock_offset_s: float | None = None

    @property
    def is_well(self) -> bool:
        """Whether it answered."""
        return self.is_asked and self.is_private_line and not self.is_absent and self.trouble is None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeySeen:
    """OLLAMA_API_KEY. prefix: what listings show of one of ours, empty for a text that is no key of a Corral hub. fault: why it
    is none, as what follows its name in a sentence. standing: None when it was sent nowhere. is_listed: whether the account's
    list, of the device or of the key itself, has it, None where no list was told. The rest is what the list says."""

    prefix: str = ""
    fault: str = ""
    standing: Standing | None = None
    is_listed: bool | None = None
    scopes: tuple[str, ...] | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All of it. platform: as sys.platform. version: of this command. user: the OS user. saved_hub: of the last sign-in.
    memory_trouble: why what is remembered of hubs cannot be read. device: None when no signed request was made. api_key: None
    when none is set. models, engine, authorized: None when they were not looked at.
    is_loopback_proxied: whether other programs than ours
    would reach this machine by a proxy. is_signing: OLLAMA_AUTH. warnings: of settings."""

    now: datetime
    platform: str
    version: str
    user: str
    key: KeyFile
    server: ServerSeen
    hub: HubSeen
    saved_hub: str = ""
    memory_trouble: Trouble | None = None
    is_cloud_off_here: bool = False
    is_signing: bool = False
    device: Standing | None = None
    api_key: ApiKeySeen | None = None
    models: ModelsFolder | None = None
    engine: EngineSeen | None = None
    authorized: AuthorizedSeen | None = None
    is_loopback_proxied: bool = False
    warnings: tuple[str, ...] = field(default=())
