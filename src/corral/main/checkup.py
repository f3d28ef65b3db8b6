"""What only the adapters know of this machine, for `corral doctor`: looked at, and left as it is.

Nothing here makes a key, a folder or a note of what was agreed with a hub, as the same adapters do for every other command.
"""

import contextlib
import ipaddress
import os
import shutil
import socket
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import corral
from corral.core.checkup import AuthorizedSeen, EngineSeen, KeyFile, ModelsFolder, Trouble
from corral.main.shared import SystemEntropy, device_name, hub_memory, shortened
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    import aiohttp

    from corral.clients.hub import HubClient
    from corral.core.ports import Clock, HubMemory, HubTerms
    from corral.settings import Settings
    from corral.wire.signing import DevicePrivateKey

_LISTENING = "0A"


def trouble_of(error: CorralError) -> Trouble:
    """A failure as what was wrong and what to do."""
    message, _, advice = error.message.partition(" → ")
    return Trouble(message, advice)


def _trouble_with(error: CorralError, path: Path, shown: str) -> Trouble:
    """A failure that calls a file as every row does."""
    trouble = trouble_of(error)
    return Trouble(trouble.message.replace(str(path), shown), trouble.advice.replace(str(path), shown))


def device_key(settings: "Settings") -> "tuple[KeyFile, DevicePrivateKey | None]":
    """What is to be said of the device key, and the key where it can be used. It is not made."""
    from corral.storage.home import FileDeviceKeys

    path = settings.home / ".ollama" / "id_ed25519"
    shown = shortened(path, settings.home)
    try:
        key = FileDeviceKeys(path.parent, SystemEntropy()).load()
        if key is None:
            return KeyFile(path=shown), None
        return KeyFile(path=shown, fingerprint=key.public.fingerprint, mode=path.stat().st_mode & 0o7777), key
    except CorralError as error:
        return KeyFile(path=shown, trouble=_trouble_with(error, path, shown)), None
    except OSError as error:
        return KeyFile(path=shown, trouble=Trouble(f"{shown} cannot be read: {error.strerror}")), None


def saved_hub(settings: "Settings") -> tuple[str, Trouble | None]:
    """(the hub of the last sign-in, why it cannot be read)."""
    try:
        return hub_memory(settings).hub(), None
    except CorralError as error:
        return "", trouble_of(error)


def knows_hub(settings: "Settings", hub: str) -> bool:
    """Whether something was agreed with that hub from this home."""
    try:
        return hub_memory(settings).terms(hub) is not None
    except CorralError:
        return False


def is_cloud_off(settings: "Settings") -> bool:
    """Whether a server that is started here now would refuse cloud models."""
    from corral.storage.hubstate import is_cloud_off

    try:
        return settings.is_cloud_off or is_cloud_off(settings.home / ".ollama" / "server.json")
    except CorralError:
        return False


def models_folder(settings: "Settings") -> ModelsFolder:
    """The folder of models, where there is one."""
    from corral.storage.manifests import ManifestTree

    path = settings.models_dir
    shown = shortened(path, settings.home)
    if not path.is_dir():
        # In an empty home, two folders are made on the way.
        is_own = path.is_relative_to(settings.home)
        return ModelsFolder(path=shown, is_there=False, has_parent=is_own or path.parent.is_dir(), free_bytes=_free_bytes(path))
    try:
        count = sum(1 for _ in ManifestTree(path / "manifests").walk())
        is_readable = os.access(path, os.R_OK | os.X_OK)
    except OSError:
        count, is_readable = 0, False
    return ModelsFolder(
        path=shown,
        owner=user_name(path.stat().st_uid),
        is_readable=is_readable,
        is_writable=os.access(path, os.W_OK),
        free_bytes=_free_bytes(path),
        models=count,
    )


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def authorized(settings: "Settings") -> AuthorizedSeen | None:
    """Who may use the server of this home; None where nobody set that up."""
    from corral.main.authorizing import authorized_keys

    path = settings.authorized_keys
    if settings.local_auth == "off" and not os.path.lexists(path):
        return None
    shown = shortened(path, settings.home)
    try:
        found = authorized_keys(settings)
    except CorralError as error:
        return AuthorizedSeen(path=shown, trouble=_trouble_with(error, path, shown))
    return AuthorizedSeen(path=shown, keys=len(found.entries), complaints=found.complaints)


async def engine(settings: "Settings") -> EngineSeen:
    """What runs models, started once without one."""
    from corral.engines.checkup import try_engine
    from corral.engines.llamacpp import find_llama_server

    try:
        return EngineSeen(name=await try_engine(_llama_server(settings, find_llama_server), settings.engine_environ))
    except CorralError as error:
        return EngineSeen(trouble=trouble_of(error))


def _llama_server(settings: "Settings", find: Callable[[str, str], str]) -> str:
    try:
        return find(settings.llama_server, settings.search_path)
    except CorralError as error:
        raise CorralError("engine_failed", f"{error.message} → correct CORRAL_LLAMA_SERVER, or unset it") from error


# ── Addresses and users ──────────────────────────────────────────────────────────────────────────────────────────────


def is_own_address(host: str) -> bool:
    """Whether that is this machine's name or one of its addresses, or stands for all of them. Other names are not resolved."""
    if host == socket.gethostname():
        return True
    try:
        address = ipaddress.ip_address(host)
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # What belongs to nobody here cannot be bound.
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True


def own_user() -> str:
    """The OS user that this process runs as."""
    return user_name(os.geteuid())


def user_name(uid: int) -> str:
    """The name of an OS user, or its number."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def listening_user(port: int, root: Path = Path("/")) -> str:
    """The OS user whose process listens on a port of this machine; empty where the system does not tell, or several do."""
    owners = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (root / "proc/net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    owners.add(int(fields[7]))
    return user_name(owners.pop()) if len(owners) == 1 else ""


def platform() -> str:
    """As sys.platform."""
    return sys.platform


# ── The hub, signed for and nothing kept ─────────────────────────────────────────────────────────────────────────────


class _OneKey:
    """A `DeviceKeys` of one key that was read before."""

    def __init__(self, key: "DevicePrivateKey") -> None:
        self._key = key

    def load(self) -> "DevicePrivateKey | None":
        return self._key

    def load_or_create(self) -> "DevicePrivateKey":
        return self._key


class _Unwritten:
    """A `HubMemory` that reads the file and keeps what is new to itself, so that a hub that agreed on the strong signature is
    held to it here as well."""

    def __init__(self, kept: "HubMemory") -> None:
        self._kept = kept
        self._chosen = ""
        self._new: dict[str, HubTerms] = {}

    def hub(self) -> str:
        return self._chosen or self._kept.hub()

    def choose_hub(self, hub: str) -> None:
        self._chosen = hub

    def terms(self, hub: str) -> "HubTerms | None":
        return self._new.get(hub) or self._kept.terms(hub)

    def keep_terms(self, hub: str, terms: "HubTerms") -> None:
        self._new[hub] = terms


class _HubsClock:
    """A `Clock`, put right by the hub's."""

    def __init__(self, clock: "Clock", offset_s: float) -> None:
        self._clock = clock
        self._offset = timedelta(seconds=offset_s)

    def now(self) -> datetime:
        return self._clock.now() + self._offset

    def monotonic_ns(self) -> int:
        return self._clock.monotonic_ns()


def looking_client(
    settings: "Settings",
    hub: str,
    key: "DevicePrivateKey",
    *,
    session: "aiohttp.ClientSession",
    clock: "Clock",
    offset_s: float,
) -> "HubClient":
    """Signed requests as `shared.hub_client` makes them, that leave no trace on this machine. offset_s: how far this machine's
    clock is behind the hub's: for a hub of the strong signature, which is good at that hub and nowhere else. A stock signature of
    a time that the hub claims would be good at any other hub when that time comes (T18), so there it stays 0."""
    from corral.clients.hub import HubClient

    return HubClient(
        lambda: hub,
        _OneKey(key),
        memory=_Unwritten(hub_memory(settings)),
        clock=_HubsClock(clock, offset_s),
        entropy=SystemEntropy(),
        session=session,
        device_name=device_name(),
        version=corral.__version__,
        proxies=settings.proxies,
    )
