"""Unsigned HTTP to a server, by the standard library alone: `corral list` takes less time than importing an asynchronous client.

The CLI is one caller with one request at a time, so plain blocking sockets are all it needs; Ctrl-C interrupts them.
"""

import contextlib
import http.client
import json
import ssl
from base64 import b64encode
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import corral
from corral.cli.context import Failed

if TYPE_CHECKING:
    from corral.settings import Address, Settings
    from corral.wire.proxies import ProxyRules
    from corral.wire.secrets import Secret

_CONNECT_TIMEOUT_S = 10.0
_HUB_TIMEOUT_S = 30.0
#: For what is only good to know.
_STRANGER_TIMEOUT_S = 5.0
_MAX_ERROR_BYTES = 64 * 1024
#: What only a local server can be asked.
_INSTALLING = ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/")


class ApiError(Failed):
    """The server answered with an error. code: its HTTP status; body: its JSON object, empty when it was none; reason: what
    stands before the text where a stream was asked for, as in Ollama (`404 Not Found`). said: the text without it."""

    def __init__(self, code: int, body: Mapping[str, Any], text: str, *, reason: str = "") -> None:
        self.code = code
        self.body = body
        self.said = str(body.get("error") or text or f"the server answered {code}")
        # Our own servers put what to do behind an arrow.
        text, _, advice = self.said.partition(" → ")
        message = f"{reason}: {text}" if reason else text
        signin_url = body.get("signin_url")
        if code == 401 and isinstance(signin_url, str):
            message, advice = f"not signed in to {urlsplit(signin_url).netloc}", "corral signin"
        super().__init__(message, advice)


class ServerApi:
    """One server. timeout_s: how long to wait for a connection and between bytes; None waits for ever for bytes, as a model that
    is being loaded demands. kind: what it should be, for errors. api_key: sent as Bearer, except over plain http to another
    machine. proxies: by what https is spoken with another machine."""

    def __init__(
        self,
        address: "Address",
        api_key: "Secret | None",
        *,
        advice: str,
        kind: str,
        timeout_s: float | None = None,
        proxies: "ProxyRules",
    ) -> None:
        self._address = address
        self._api_key = api_key
        self._advice = advice
        self._kind = kind
        self._timeout_s = timeout_s
        self.proxies = proxies

    @classmethod
    def of_hub(cls, hub: str, api_key: "Secret", proxies: "ProxyRules") -> "ServerApi":
        """A hub, asked with an API key. Raises: Failed for one that would get the key over plain http."""
        address, parts = _address_of(hub), urlsplit(hub)
        if parts.scheme != "https" and not address.is_loopback:
            raise Failed(f"{hub} would get the API key over plain http", "use its https address")
        return cls(address, api_key, advice="is it running?", kind="a hub", timeout_s=_HUB_TIMEOUT_S, proxies=proxies)

    @classmethod
    def of_stranger(cls, hub: str, proxies: "ProxyRules") -> "ServerApi":
        """A hub, asked without any credential."""
        address = _address_of(hub)
        return cls(address, None, advice="is it running?", kind="a hub", timeout_s=_STRANGER_TIMEOUT_S, proxies=proxies)

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._address.url

    def get(self, path: str) -> Any:
        """The answer's JSON. Raises: ApiError, Failed when nobody answers."""
        return self.request("GET", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON. Raises: ApiError, Failed when nobody answers."""
        return self.request("POST", path, body)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The objects of an NDJSON answer as they arrive. Closing the iterator ends the request at the server.
        Raises: ApiError, also for an error within the stream."""
        connection, response = self._send("POST", path, body, is_stream=True)
        try:
            while line := response.readline():
                event = json.loads(line)
                if "error" in event:
                    raise ApiError(200, event, "")
                yield event
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise Failed("the server stopped before its answer was complete", "look at its log") from error
        finally:
            # The socket is the answer's alone where the server said that it closes the connection.
            response.close()
            connection.close()

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON. Raises: ApiError, Failed when nobody answers."""
        connection, response = self._send(method, path, body)
        try:
            text = response.read()
            return json.loads(text) if text.strip() else None
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise Failed(*self._stranger()) from error
        finally:
            connection.close()

    def has(self, path: str) -> bool:
        """Whether HEAD finds something there. Raises: ApiError for any answer but yes and no, Failed when nobody answers."""
        try:
            connection, _ = self._send("HEAD", path, None)
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        connection.close()
        return True

    def upload(self, path: str, chunks: Iterable[bytes], size_bytes: int) -> None:
        """POST a body of that many bytes, as it is. Raises: ApiError, Failed when nobody answers."""
        connection = self._connect()
        target, proven = self._proven("POST", path)
        headers = {**proven, "Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        # A server that refuses may close before it has read all; what it answered is there all the same.
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", f"{self._address.path}{target}", chunks, headers)
            self._answer(connection, path)
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, is_stream: bool = False
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._connect()
        payload = None if body is None else json.dumps(body).encode()
        try:
            target, headers = self._proven_with_body(method, path, payload or b"")
            connection.request(method, f"{self._address.path}{target}", payload, headers)
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            raise self._silent() from error
        return connection, self._answer(connection, path, is_stream=is_stream)

    def _answer(self, connection: http.client.HTTPConnection, path: str, *, is_stream: bool = False) -> http.client.HTTPResponse:
        try:
            response = connection.getresponse()
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            raise self._silent() from error
        if response.status >= 300:
            text = response.read(_MAX_ERROR_BYTES)
            connection.close()
            body = _object(text)
            if text.strip() and not body:
                raise Failed(*self._stranger())
            raise self._refusal(response.status, body, f"{response.status} {response.reason}" if is_stream else "")
        return response

    def _refusal(self, status: int, body: Mapping[str, Any], reason: str) -> ApiError:
        return ApiError(status, body, "", reason=reason)

    def _silent(self) -> Failed:
        return Failed(f"{self.url} closed the connection without an answer", "is that address an Ollama server's?")

    def _connect(self) -> http.client.HTTPConnection:
        # Over http a proxy would read the prompts, and nothing would prove who is behind it.
        is_https = self._address.scheme == "https"
        proxy = self.proxies.proxy_of(self._address.url) if is_https else None
        connection = self._direct() if proxy is None else self._tunnel(proxy)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            connection.close()
            text = f"the TLS certificate of {self.url} was not accepted: {error.reason}"
            raise Failed(text, "check the address; an authority of your own goes into SSL_CERT_FILE") from error
        except ssl.SSLError as error:
            connection.close()
            raise Failed(
                f"{self.url} does not speak TLS as it should", "if it speaks http, its address begins with http://"
            ) from error
        except OSError as error:
            connection.close()
            if proxy is not None:
                text = f"could not connect to {self.url}: the proxy did not let it through"
                raise Failed(text, "check HTTPS_PROXY and NO_PROXY") from error
            raise self._unreachable(error) from error
        connection.sock.settimeout(self._timeout_s)
        return connection

    def _direct(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        return kind(self._host, self._address.port, timeout=self._timeout_s or _CONNECT_TIMEOUT_S)

    def _tunnel(self, proxy: str) -> http.client.HTTPConnection:
        """TLS with the server through a proxy, which sees its name and port. Raises: Failed for a proxy that itself wants TLS."""
        parts = urlsplit(proxy)
        if parts.scheme != "http":
            raise Failed("commands go through proxies of http:// only", "give HTTPS_PROXY an http address, or set NO_PROXY")
        headers = {}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Proxy-Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port or 80, timeout=self._timeout_s or _CONNECT_TIMEOUT_S
        )
        connection.set_tunnel(self._host, self._address.port, headers)
        return connection

    @property
    def _host(self) -> str:
        return urlsplit(self._address.url).hostname or self._address.host

    def _unreachable(self, error: OSError) -> Failed:
        reason = {ConnectionRefusedError: "nothing listens there", TimeoutError: "it does not answer"}.get(type(error))
        return Failed(f"could not connect to {self.url}: {reason or error.strerror or 'it is not reachable'}", self._advice)

    def require(self) -> None:
        """Return when a server answers. Raises: Failed."""
        with contextlib.suppress(ApiError):
            self._send("HEAD", "/", None)[0].close()

    def _stranger(self) -> tuple[str, str]:
        # What it says instead may be a whole web page, and is nobody's error text.
        setting = "CORRAL_HUB or --hub" if self._kind == "a hub" else "OLLAMA_HOST"
        advice = f"check {setting}; another program may have that port"
        return f"{urlsplit(self.url).netloc} does not answer like {self._kind}", advice

    def _proven(self, method: str, path: str) -> tuple[str, dict[str, str]]:
        """(what is asked for, the headers): with whatever proves who asks."""
        return path, self._headers()

    def _proven_with_body(self, method: str, path: str, body: bytes) -> tuple[str, dict[str, str]]:
        """The same for a request whose whole body is known."""
        return self._proven(method, path)

    @property
    def _may_carry_key(self) -> bool:
        # OLLAMA_HOST may name a hub or a server behind a proxy that checks keys; over plain http the key stays here.
        return self._address.scheme == "https" or self._address.is_loopback

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/x-ndjson",
            "User-Agent": f"corral/{corral.__version__}",
        }
        if self._api_key and self._may_carry_key:
            headers["Authorization"] = f"Bearer {self._api_key.reveal()}"
        return headers


class LocalApi(ServerApi):
    """The server at OLLAMA_HOST."""

    def __init__(self, settings: "Settings", *, timeout_s: float | None = None) -> None:
        super().__init__(
            settings.local,
            settings.api_key,
            advice="check OLLAMA_HOST",
            kind="an Ollama server",
            timeout_s=timeout_s,
            proxies=settings.proxies,
        )
        self._settings = settings

    def hub(self) -> str:
        """The hub that the server uses; empty where nobody answers, or only Ollama's, which does not tell."""
        try:
            status = self.get("/api/status")
        except Failed:
            return ""
        hub = status.get("hub") if isinstance(status, dict) else None
        return hub if isinstance(hub, str) else ""

    def is_asking(self) -> bool | None:
        """Whether the server asks others for a credential; None where nobody answers, or only who does not tell."""
        try:
            status = self.get("/api/status")
        except ApiError as error:
            return True if error.code == 401 and "signin_url" not in error.body else None
        except Failed:
            return None
        asks = status.get("auth") if isinstance(status, dict) else None
        return asks != "off" if isinstance(asks, str) else None

    def _answer(self, connection: http.client.HTTPConnection, path: str, *, is_stream: bool = False) -> http.client.HTTPResponse:
        try:
            return super()._answer(connection, path, is_stream=is_stream)
        except ApiError as error:
            # OLLAMA_HOST may well name a hub, whose models run without a local server; its "not found" would be no answer.
            if error.code == 404 and path.startswith(_INSTALLING) and self._is_hub():
                text = f"{urlsplit(self.url).netloc} is a hub, which installs no models"
                raise Failed(text, "unset OLLAMA_HOST, or set it to a local server's address") from error
            raise

    def _is_hub(self) -> bool:
        try:
            document = self.get("/.well-known/corral")
        except Failed:
            return False
        return isinstance(document, dict) and "public_url" in document

    def _refusal(self, status: int, body: Mapping[str, Any], reason: str) -> ApiError:
        """A 401 without a link to sign in at is no hub's that the server passes on, but its own: it wants an API key."""
        error = super()._refusal(status, body, reason)
        if status == 401 and body.get("is_known") is True:
            error.message = f"{urlsplit(self.url).netloc} knows this key, but its line there does not apply to this request"
            error.advice = "its log says why; there: corral authorize list"
        elif status == 401 and "signin_url" not in body:
            error.message, error.advice = self._about_device() if self._settings.is_signing else self._about_key()
        return error

    def _about_device(self) -> tuple[str, str]:
        from corral.main.shared import device_public_key

        advice = f'there: corral authorize add --name NAME "{device_public_key(self._settings).authorized_key}"'
        return f"{urlsplit(self.url).netloc} does not let this device in", advice

    def _about_key(self) -> tuple[str, str]:
        place = urlsplit(self.url).netloc
        if not self._may_carry_key:
            text = "asks for an API key, and over plain http it gets none"
            return f"{place} {text}", "sign: OLLAMA_AUTH=1, or give OLLAMA_HOST its https address"
        if self._api_key is None:
            return f"{place} asks for an API key", "put one into OLLAMA_API_KEY, or sign: OLLAMA_AUTH=1"
        return refused_key(place, "the page where you made it")

    def _proven(self, method: str, path: str) -> tuple[str, dict[str, str]]:
        """With OLLAMA_AUTH, signed by this device, for a proxy that checks it. Raises: Failed where others could read the
        signature and use it again."""
        if not self._settings.is_signing:
            return super()._proven(method, path)
        if not self._may_carry_key:
            raise Failed(f"OLLAMA_AUTH would send this device's signature to {self.url} over plain http", "use its https address")
        from corral.main.shared import signed_request

        target, authorization = signed_request(self._settings, method, path)
        return target, {**self._headers(), "Authorization": authorization}

    def _proven_with_body(self, method: str, path: str, body: bytes) -> tuple[str, dict[str, str]]:
        """Over plain http to another machine by the stronger signature: it is good for this request, at this server, once, so
        whoever reads it has nothing. Only a Corral takes it."""
        if not self._settings.is_signing or self._may_carry_key:
            return self._proven(method, path)
        from corral.main.shared import strong_signature

        headers = {**self._headers(), "Host": urlsplit(self.url).netloc}
        return path, {**headers, **strong_signature(self._settings, method, self.url + path, headers, body=body)}

    def _unreachable(self, error: OSError) -> Failed:
        if not (self._address.is_loopback and isinstance(error, ConnectionRefusedError)):
            return super()._unreachable(error)
        text = "could not connect to corral server, run 'corral serve' to start it"
        return Failed(text, f"nothing listens on {self.url}; set OLLAMA_HOST if it is elsewhere")


def refused_key(place: str, page: str) -> tuple[str, str]:
    """(what to say of OLLAMA_API_KEY when a server does not take it, what to do). page: where there are others."""
    return f"{place} refused the API key in OLLAMA_API_KEY: it is wrong, expired or revoked", f"take another one from {page}"


def _address_of(hub: str) -> "Address":
    from corral.settings import Address

    parts = urlsplit(hub)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Address(scheme=parts.scheme, host=parts.hostname or "", port=port)


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
