"""The hub's JSON surface: who am I, devices, API keys, usage and health. One visible route list; handlers only translate."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, TypeVar
from uuid import NAMESPACE_OID, uuid5

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import corral
from corral.core.policy import CLIENT_PROOFS, FULL_PROOFS, HEADLESS_PROOFS, PUBLIC, Access, check_step_up, may_grant
from corral.core.ports import Clock, UsageStore
from corral.core.records import ApiKey, Device, Principal, Proof, Scope
from corral.edges.asgi import Endpoint, body_of, caller_of, endpoint, facts_of, json_response
from corral.hub.credentials import Credentials
from corral.wire.discovery import OLLAMA_VERSION
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from corral.wire.signing import check_window, enrollment_challenge, parse_authorized_key, parse_encoded_key, verify_enrollment
from corral.wire.strong import TAG

T = TypeVar("T")

_OVERLAPS_S = {"0": 0, "1h": 3600, "24h": 86_400, "7d": 604_800}
_USAGE_PERIOD = timedelta(days=30)

#: Reading who one is, and signing one's own device out: what stock clients do with their signature.
_IDENTITY = Access(CLIENT_PROOFS)
#: Managing keys and devices: never by the stock signature (W1), and only with the scope `keys`.
_KEYS = Access(FULL_PROOFS, Scope.KEYS)
#: Adding a device without a browser.
_HEADLESS = Access(HEADLESS_PROOFS, Scope.KEYS)


@lru_cache(maxsize=4096)
def _uuid_of(account_id: str) -> str:
    # Ollama's own command reads a UUID here and refuses the whole answer over anything else. Kept, since it asks often.
    return str(uuid5(NAMESPACE_OID, f"corral account {account_id}"))


class NewKey(msgspec.Struct):
    """Body of POST /api/keys. expires_at: RFC 3339, or absent for a key that does not expire."""

    name: str
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class Rotation(msgspec.Struct):
    """Body of POST /api/keys/{id}/rotate. overlap: how long the old key lives on: `0`, `1h`, `24h` or `7d`."""

    overlap: str = "0"


class NewDevice(msgspec.Struct):
    """Body of POST /api/user/keys. key: `ssh-ed25519 AAAA…`. ts, signature: the device's, over `enrollment_challenge`."""

    name: str
    key: str
    ts: Annotated[int, msgspec.Meta(ge=0, lt=10**10)] = 0
    signature: str = ""


class DeviceChange(msgspec.Struct):
    """Body of PATCH /api/user/keys/{encodedKey}. scopes: all that the device may do from now on."""

    scopes: frozenset[Scope]


class HubApi:
    """Handlers over the hub's identity services. is_ready: answers whether requests can be served."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        usage: UsageStore,
        clock: Clock,
        public_url: str,
        is_ready: Callable[[], Awaitable[bool]],
    ) -> None:
        self._credentials = credentials
        self._usage = usage
        self._clock = clock
        self._public_url = public_url
        self._is_ready = is_ready

    def endpoints(self) -> list[Endpoint]:
        """Every JSON route of the hub that is not inference or registry."""
        return [
            endpoint("POST,GET", "/api/me", self.me, _IDENTITY),
            endpoint("GET", "/api/user/keys", self.list_devices, _KEYS),
            endpoint("POST", "/api/user/keys", self.add_device, _HEADLESS),
            endpoint("DELETE", "/api/user/keys/{encoded_key}", self.sign_out_device, _IDENTITY),
            endpoint("PATCH", "/api/user/keys/{encoded_key}", self.change_device, _KEYS),
            endpoint("GET", "/api/keys", self.list_keys, _KEYS),
            endpoint("POST", "/api/keys", self.create_key, _KEYS),
            endpoint("DELETE", "/api/keys/{key_id}", self.revoke_key, _KEYS),
            endpoint("POST", "/api/keys/{key_id}/rotate", self.rotate_key, _KEYS),
            endpoint("GET", "/api/usage", self.show_usage, _KEYS),
            endpoint("GET,HEAD", "/api/version", self.version, PUBLIC),
            endpoint("GET", "/api/ps", self.running, PUBLIC),
            endpoint("GET", "/.well-known/corral", self.discovery, PUBLIC),
            endpoint("GET,HEAD", "/healthz", self.health, PUBLIC),
            endpoint("GET,HEAD", "/readyz", self.readiness, PUBLIC),
        ]

    async def me(self, request: Request) -> Response:
        """The account behind a credential, in the form of ollama api/types.go UserResponse."""
        caller = caller_of(request)
        account = caller.account
        body: dict[str, Any] = {"id": _uuid_of(account.id), "email": account.email, "name": account.name, "plan": "free"}
        if caller.device:
            body["device"] = {"id": caller.device.id, "name": caller.device.name}
        return json_response(body)

    async def list_devices(self, request: Request) -> Response:
        """The account's live devices."""
        caller = caller_of(request)
        devices = await self._credentials.devices_of(caller.account)
        return json_response([device_body(device, caller) for device in devices])

    async def add_device(self, request: Request) -> Response:
        """Connect a device without a browser, by a credential with the scope `keys`. Public keys are no secret, so the device
        signs for it: nobody can bind somebody else's (W8). Raises: forbidden, clock_skew."""
        caller = caller_of(request)
        wanted = _decode(request, NewDevice)
        self._check_possession(wanted, caller)
        device = await self._credentials.add_device(
            caller,
            name=wanted.name,
            authorized_key=wanted.key,
            scopes=may_grant(caller.scopes),
            network=facts_of(request).network,
        )
        return json_response(device_body(device, caller), 201)

    def _check_possession(self, wanted: NewDevice, caller: Principal) -> None:
        key = parse_authorized_key(wanted.key)
        if not wanted.signature or not wanted.ts:
            raise CorralError("forbidden", "the device must sign for being added: send ts and signature; corral signin does")
        check_window(wanted.ts, self._clock.now().timestamp())
        message = enrollment_challenge(self._public_url, caller.credential_id, wanted.ts)
        verify_enrollment(key, wanted.signature, message)

    async def change_device(self, request: Request) -> Response:
        """Say what a device of the account may do, from its next request on. More than it may now takes a fresh password where a
        browser asks. Raises: bad_request, not_found, forbidden."""
        caller, wanted = caller_of(request), _decode(request, DeviceChange)
        key = parse_encoded_key(request.path_params["encoded_key"])
        device = next((found for found in await self._credentials.devices_of(caller.account) if found.key == key), None)
        if device is not None and not wanted.scopes <= device.scopes:
            check_step_up(caller, self._clock.now())
        # One that is not there is asked for all the same, since who asks for others' is written down (T66).
        device_id, network = device.id if device else key.fingerprint, facts_of(request).network
        changed = await self._credentials.set_device_scopes(caller, device_id, wanted.scopes, network=network)
        return json_response(device_body(changed, caller))

    async def sign_out_device(self, request: Request) -> Response:
        """Disconnect one device of the account. Answers `null`, as ollama.com does."""
        encoded_key, network = request.path_params["encoded_key"], facts_of(request).network
        await self._credentials.sign_out_device(caller_of(request), encoded_key, network=network)
        return json_response(None)

    async def list_keys(self, request: Request) -> Response:
        """The account's API keys, revoked ones included."""
        keys = await self._credentials.keys_of(caller_of(request).account)
        return json_response([key_body(key) for key in keys])

    async def create_key(self, request: Request) -> Response:
        """A new API key; its secret is in this answer and never again."""
        caller, wanted = self._giver(request), _decode(request, NewKey)
        key, secret = await self._credentials.create_key(
            caller,
            name=wanted.name,
            scopes=wanted.scopes,
            expires_at=wanted.expires_at,
            network=facts_of(request).network,
        )
        return _secret_response(key, secret, 201)

    async def rotate_key(self, request: Request) -> Response:
        """A successor with the same name and scopes; the old key lives on for the overlap."""
        caller = self._giver(request)
        wanted = _decode(request, Rotation) if body_of(request) else Rotation()
        if wanted.overlap not in _OVERLAPS_S:
            raise CorralError("invalid", f"overlap is one of {', '.join(_OVERLAPS_S)}")
        key, secret = await self._credentials.rotate_key(
            caller,
            request.path_params["key_id"],
            overlap_s=_OVERLAPS_S[wanted.overlap],
            network=facts_of(request).network,
        )
        return _secret_response(key, secret, 201)

    async def revoke_key(self, request: Request) -> Response:
        """Refused from the next request on, in every worker."""
        key_id, network = request.path_params["key_id"], facts_of(request).network
        await self._credentials.revoke_key(caller_of(request), key_id, network=network)
        return json_response(None)

    def _giver(self, request: Request) -> Principal:
        """Who may give a credential away now. Raises: forbidden with `step_up` for a browser whose password is old."""
        caller = caller_of(request)
        check_step_up(caller, self._clock.now())
        return caller

    async def show_usage(self, request: Request) -> Response:
        """What the account used in the last 30 days, by credential and model."""
        since = self._clock.now() - _USAGE_PERIOD
        rows = await self._usage.totals(caller_of(request).account.id, since=since)
        names = ("credential", "model", "requests", "prompt_tokens", "eval_tokens")
        return json_response({"since": _iso(since), "usage": [dict(zip(names, row, strict=True)) for row in rows]})

    async def version(self, request: Request) -> Response:
        """The version of Ollama whose behaviour this is, which clients compare, and our own."""
        return json_response({"version": OLLAMA_VERSION, "corral": corral.__version__})

    async def running(self, request: Request) -> Response:
        """Refused, in words: which models are running would tell what others do. Clients that were given the hub for a local
        server ask here."""
        raise CorralError("not_found", "a hub does not say what it runs; ask a local server")

    async def discovery(self, request: Request) -> Response:
        """What a client needs to know before it signs in: the base URL that signatures cover, and the forms understood."""
        return json_response(
            {"corral": corral.__version__, "public_url": self._public_url, "signatures": [TAG, "stock"]},
        )

    async def health(self, request: Request) -> Response:
        """Whether the process answers."""
        return json_response({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """Whether requests can be served now."""
        if not await self._is_ready():
            raise CorralError("unavailable", retry_after_s=1)
        return json_response({"status": "ready"})


def device_body(device: Device, caller: Principal | None = None) -> dict[str, Any]:
    """A device as JSON. current: whether it is the one that asks."""
    return {
        "id": device.id,
        "name": device.name,
        "fingerprint": device.key.fingerprint,
        "key": device.key.authorized_key,
        "scopes": sorted(device.scopes),
        "created_at": _iso(device.created_at),
        "last_used_at": _iso(device.last_used_at),
        "last_network": device.last_network,
        "current": caller is not None and caller.device is not None and caller.device.id == device.id,
    }


def key_body(key: ApiKey) -> dict[str, Any]:
    """An API key as JSON, without its secret."""
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": sorted(key.scopes),
        "created_at": _iso(key.created_at),
        "expires_at": _iso(key.expires_at),
        "last_used_at": _iso(key.last_used_at),
        "revoked_at": _iso(key.revoked_at),
    }


def _secret_response(key: ApiKey, secret: Secret, status: int) -> Response:
    return json_response({**key_body(key), "key": secret.reveal()}, status)


def _iso(time: datetime | None) -> str | None:
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z") if time else None


def _decode(request: Request, kind: type[T]) -> T:
    body = body_of(request)
    if not body:
        raise CorralError("bad_request", "missing request body")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise CorralError("invalid", str(error)) from error
    except (RecursionError, UnicodeDecodeError) as error:
        raise CorralError("bad_request", "the body is not JSON") from error


# A signature proves a device and a session proves a browser; an API key may stand in for either on these routes.
assert Proof.STOCK_SIGNATURE not in _KEYS.proofs
