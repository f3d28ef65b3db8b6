"""The hub, for commands: which one it is, and requests to it, signed by this device or with the API key of the environment."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from corral.cli.api import ApiError, LocalApi, ServerApi, refused_key
from corral.cli.context import Environment, Failed

if TYPE_CHECKING:
    from corral.clients.hub import HubClient
    from corral.core.ports import HubMemory
    from corral.settings import Settings
    from corral.wire.secrets import Secret

#: Long enough for a server that is alive on this machine; a command must not hang on one that is not.
_STATUS_TIMEOUT_S = 2.0


def chosen_hub(environment: Environment, option: str) -> str:
    """The base URL of the hub that somebody chose: the option, else CORRAL_HUB, else the hub of the local server that runs here,
    else the saved one; empty when nobody did. Raises: BadSetting."""
    from corral.main.shared import hub_memory
    from corral.settings import parse_hub_url

    settings = environment.settings
    if option:
        return parse_hub_url(option, where="--hub")
    return settings.hub or hub_of_local_server(settings) or hub_memory(settings).hub()


def hub_of_local_server(settings: "Settings") -> str:
    """The hub that the running local server uses, empty when none runs. Only a server on this machine is asked: whoever answers
    chooses where this device's signature goes."""
    if not settings.local.is_loopback:
        return ""
    return LocalApi(settings, timeout_s=_STATUS_TIMEOUT_S).hub()


def host_of(url: str) -> str:
    """`localhost:11435` of `http://localhost:11435`: how sentences name a hub."""
    return urlsplit(url).netloc


def not_signed_in(hub: str) -> Failed:
    """What a command says that needs an account and has none."""
    return Failed(f"not signed in to {host_of(hub)}", "corral signin")


class HubAccess:
    """Requests to one hub. client: signs as this device. memory: where the choice of a hub is kept."""

    def __init__(self, hub: str, client: "HubClient", memory: "HubMemory", settings: "Settings") -> None:
        self.hub = hub
        self.client = client
        self.memory = memory
        self._settings = settings

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON to a request signed by this device, or, when this device is not connected and OLLAMA_API_KEY is set,
        sent with that key. Raises: ApiError, Failed."""
        status, answer = await self.signed(method, path, body)
        if status == 401 and self._settings.api_key is not None:
            return self.by_own_key(method, path, body)
        if status >= 300:
            raise self._refusal(status, answer)
        return answer

    @property
    def has_key(self) -> bool:
        """Whether OLLAMA_API_KEY is set."""
        return self._settings.api_key is not None

    def by_own_key(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON to a request sent with OLLAMA_API_KEY, which is set. Raises: ApiError, Failed."""
        assert self._settings.api_key is not None
        try:
            return self.by_key(self._settings.api_key).request(method, path, body)
        except ApiError as error:
            if error.code != 401:
                raise
            raise Failed(*refused_key(host_of(self.hub), f"{self.hub}/settings/keys")) from error

    def by_key(self, api_key: "Secret") -> ServerApi:
        """The hub, asked with an API key. Raises: Failed for one that would get the key over plain http."""
        return ServerApi.of_hub(self.hub, api_key, self._settings.proxies)

    async def signed(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """(status, JSON) of a request signed by this device. Raises: CorralError when the hub cannot be asked."""
        payload = json.dumps(body).encode() if body is not None else b""
        status, _, text = await self.client.request(method, path, payload)
        try:
            return status, json.loads(text) if text.strip() else None
        except ValueError:
            return status, None

    def _refusal(self, status: int, answer: Any) -> Failed:
        body = answer if isinstance(answer, dict) else {}
        if status == 401:
            return not_signed_in(self.hub)
        if status == 404 and "error" not in body:
            return Failed(f"{host_of(self.hub)} has no such API", "use its web page")
        return ApiError(status, body, f"{host_of(self.hub)} answered {status}")


@contextlib.asynccontextmanager
async def hub_access(environment: Environment, option: str) -> AsyncIterator[HubAccess]:
    """Requests to the hub that `chosen_hub` finds, else to ollama.com. Raises: Failed when that default cannot be reached and
    nobody named it."""
    from corral.main.shared import hub_client, hub_memory
    from corral.settings import DEFAULT_HUB
    from corral.wire.errors import CorralError

    settings = environment.settings
    # A local server that was told of no hub uses the default one as well.
    hub = chosen_hub(environment, option) or DEFAULT_HUB
    async with hub_client(settings, hub) as client:
        try:
            yield HubAccess(hub, client, hub_memory(settings), settings)
        except CorralError as error:
            if option or settings.hub or hub != DEFAULT_HUB or error.code != "upstream_failed":
                raise
            message = f"{error.message.partition(' → ')[0]}; no other hub was chosen"
            raise Failed(message, "to use a hub of your own: corral signin --hub URL (corral up starts one)") from error
