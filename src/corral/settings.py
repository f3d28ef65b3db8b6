"""Every setting, read once from the environment into one frozen value. No other module looks at the environment.

Variables of Ollama keep their names and meaning; ours begin with `CORRAL_`. docs/environment.md has a sentence for each variable
of Ollama's that means nothing here. Values are trimmed of spaces and quotes, and an empty value counts as unset. Where Ollama
would fall back silently on a number it cannot read, we refuse with a sentence: a server that runs with another limit than the one
asked for is worse than one that does not start (docs/divergences.md).

Source: ollama envconfig/config.go.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from corral.wire.errors import CorralError
from corral.wire.hostnames import is_lookable
from corral.wire.mirrors import MirrorRule, parse_mirror_rule
from corral.wire.proxies import ProxyRules
from corral.wire.secrets import Secret, is_sendable
from corral.wire.units import parse_duration

DEFAULT_HUB = "https://ollama.com"
_LOCAL_PORT, _HUB_PORT = 11434, 11435

_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})

#: llama.cpp's names; the first one stands for what it takes by itself.
_KV_CACHE_TYPES = ("", "f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

_MOST_DAYS = 3650

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class BadSetting(CorralError):
    """A variable whose value cannot be used. The message names the variable and what it takes."""

    def __init__(self, message: str) -> None:
        super().__init__("invalid", message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens or is found. host: a name or an IP literal without brackets. path: `/…` or empty."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host.lower() == "localhost" or self.host.lower().endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """The base URL for callers, without a trailing slash; an unspecified address is reached by loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"{self.scheme}://{_bracketed(host)}:{self.port}{self.path}"

    def url_elsewhere(self, hostname: str) -> str:
        """What other machines type that know this one by its name; empty unless it listens on all addresses."""
        is_everywhere = self.host in ("0.0.0.0", "::")  # noqa: S104
        return f"{self.scheme}://{hostname}:{self.port}{self.path}" if is_everywhere and hostname else ""

    @property
    def bind(self) -> str:
        """`host:port`, as messages about listening name it."""
        return f"{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment asked for. Zero, empty and None mean: not set, let the part that uses it decide.

    keep_alive_s: below zero is for ever. debug: 0, 1 or 2. hub: a base URL without trailing slash, empty when nothing was said.
    remotes: hosts, or hosts with ports, in lower case at which stubs may run; none means the hub in use. is_signing: whether
    commands sign for the server at OLLAMA_HOST. logs_requests: whether prompts are written to files. editor: a command line,
    empty for none. kv_cache_type: llama.cpp's name. gpu_overhead_bytes: of each device, to be left alone.
    public_url: without trailing slash. quota_bytes: of each account's repositories; max_repositories: how many those may be.
    scrub_days: how often every blob is read again. mirrors: which repositories the hub fetches from other registries; none by
    default. search_url: of a SearXNG's JSON. web_fetch_networks: internal ones that pages may be fetched from. local_auth: who
    has to show a credential to the local server, `off`, `remote` or `on`; authorized_keys: the file that says which ones count.
    search_path: where programs are looked for. engine_environ: all variables, of which an engine gets those that tell where its
    libraries and devices are. warnings: sentences to show once when a server starts.
    """

    home: Path
    local: Address
    models_dir: Path
    keep_alive_s: float = 300.0
    load_timeout_s: float = 300.0
    context_length: int = 0
    num_parallel: int = 0
    max_loaded_models: int = 0
    max_queue: int = 512
    origins: tuple[str, ...] = ()
    is_cloud_off: bool = False
    remotes: tuple[str, ...] = ()
    is_signing: bool = False
    logs_requests: bool = False
    editor: str = ""
    flash_attention: bool | None = None
    kv_cache_type: str = ""
    gpu_overhead_bytes: int = 0
    proxies: ProxyRules = field(default_factory=ProxyRules)
    is_history_off: bool = False
    is_prune_off: bool = False
    prefers_go_template: bool | None = None
    debug: int = 0
    api_key: Secret | None = None
    hub: str = ""
    corral_home: Path
    hub_listen: Address
    public_url: str
    database_url: str = ""
    is_signup_open: bool = False
    quota_bytes: int = 0
    max_repositories: int = 1000
    scrub_days: int = 30
    mirrors: tuple[MirrorRule, ...] = ()
    search_url: str = ""
    is_web_fetch_on: bool = False
    web_fetch_networks: tuple[Network, ...] = ()
    llama_server: str = ""
    is_public_allowed: bool = False
    local_auth: str = "off"
    authorized_keys: Path
    trusted_proxies: tuple[Network, ...] = ()
    search_path: str = ""
    engine_environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Read everything. Raises: BadSetting naming the variable."""
        read = _Reader(environ)
        home = Path(read.text("HOME") or read.text("USERPROFILE") or Path.home())
        warnings: list[str] = []
        hub_listen = _listen_address("CORRAL_HUB_LISTEN", read.text("CORRAL_HUB_LISTEN"))
        public_url = _public_url(read.text("CORRAL_PUBLIC_URL"), hub_listen)
        return cls(
            home=home,
            local=parse_ollama_host(read.text("OLLAMA_HOST"), warn=warnings.append),
            models_dir=_path(read.text("OLLAMA_MODELS"), home, default=home / ".ollama" / "models"),
            keep_alive_s=read.duration("OLLAMA_KEEP_ALIVE", 300.0),
            load_timeout_s=read.duration("OLLAMA_LOAD_TIMEOUT", 300.0),
            context_length=read.count("OLLAMA_CONTEXT_LENGTH", 0),
            num_parallel=read.count("OLLAMA_NUM_PARALLEL", 0),
            max_loaded_models=read.count("OLLAMA_MAX_LOADED_MODELS", 0),
            max_queue=read.count("OLLAMA_MAX_QUEUE", 512),
            origins=read.words("OLLAMA_ORIGINS"),
            is_cloud_off=read.truth("OLLAMA_NO_CLOUD"),
            remotes=tuple(host.lower() for host in read.words("OLLAMA_REMOTES")),
            is_signing=read.truth("OLLAMA_AUTH"),
            logs_requests=read.truth("OLLAMA_DEBUG_LOG_REQUESTS"),
            editor=read.text("OLLAMA_EDITOR") or read.text("VISUAL") or read.text("EDITOR"),
            flash_attention=read.maybe("OLLAMA_FLASH_ATTENTION"),
            kv_cache_type=read.choice("OLLAMA_KV_CACHE_TYPE", _KV_CACHE_TYPES),
            gpu_overhead_bytes=read.bytes("OLLAMA_GPU_OVERHEAD"),
            proxies=ProxyRules(
                http=read.proxy("HTTP_PROXY"), https=read.proxy("HTTPS_PROXY"), exceptions=read.either_words("NO_PROXY")
            ),
            is_history_off=read.truth("OLLAMA_NOHISTORY"),
            is_prune_off=read.truth("OLLAMA_NOPRUNE"),
            prefers_go_template=read.maybe("OLLAMA_GO_TEMPLATE"),
            debug=_debug_level(read.text("OLLAMA_DEBUG")),
            api_key=_api_key(read.text("OLLAMA_API_KEY")),
            hub=_hub(read.text("CORRAL_HUB"), read.text("OLLAMA_CLOUD_BASE_URL"), warn=warnings.append),
            corral_home=_path(read.text("CORRAL_HOME"), home, default=home / ".corral"),
            hub_listen=hub_listen,
            public_url=public_url,
            database_url=_database_url(read.text("CORRAL_DATABASE_URL")),
            is_signup_open=read.choice("CORRAL_SIGNUP", ("closed", "open")) == "open",
            quota_bytes=read.size("CORRAL_QUOTA", 0),
            max_repositories=read.count("CORRAL_MAX_REPOSITORIES", 1000),
            scrub_days=_days("CORRAL_SCRUB_DAYS", read.count("CORRAL_SCRUB_DAYS", 30)),
            mirrors=tuple(_mirror_rule(number, word) for number, word in enumerate(read.words("CORRAL_MIRROR"), 1)),
            search_url=_search_url(read.text("CORRAL_SEARCH_URL")),
            is_web_fetch_on=read.choice("CORRAL_WEB_FETCH", ("off", "on")) == "on",
            web_fetch_networks=_networks("CORRAL_WEB_FETCH_NETWORKS", read.words("CORRAL_WEB_FETCH_NETWORKS")),
            llama_server=read.text("CORRAL_LLAMA_SERVER"),
            is_public_allowed=read.truth("CORRAL_ALLOW_PUBLIC"),
            local_auth=read.choice("CORRAL_LOCAL_AUTH", ("off", "remote", "on")),
            authorized_keys=_path(read.text("CORRAL_AUTHORIZED_KEYS"), home, default=home / ".ollama" / "authorized_keys"),
            trusted_proxies=_trusted_proxies(read.words("CORRAL_TRUSTED_PROXIES"), hub_listen, public_url),
            search_path=environ.get("PATH", ""),
            engine_environ=dict(environ),
            warnings=tuple(warnings),
        )


class _Reader:
    """Typed look-ups of one mapping; every refusal names the variable."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str) -> str:
        # Shells and unit files leave quotes around values; Ollama trims the same characters.
        return self._environ.get(name, "").strip(" \t\r\n").strip("\"'")

    def words(self, name: str) -> tuple[str, ...]:
        return tuple(word for part in self.text(name).split(",") if (word := part.strip()))

    def truth(self, name: str) -> bool:
        text = self.text(name)
        # As in Ollama, a value that is no boolean counts as yes: who wrote OLLAMA_NO_CLOUD=on meant it.
        return bool(text) and text not in _FALSE

    def maybe(self, name: str) -> bool | None:
        """None when nothing was said."""
        return self.truth(name) if self.text(name) else None

    def proxy(self, name: str) -> str:
        """A proxy's URL; a bare address means http. Not repeated when it is none: it may hold a password."""
        text = self.text(name) or self.text(name.lower())
        if text and "://" not in text:
            text = f"http://{text}"
        parts = _split_url(text)
        if text and (parts is None or parts.scheme not in ("http", "https") or not parts.hostname):
            raise BadSetting(f"{name} takes a proxy's address, such as http://proxy.example.org:3128")
        return text

    def either_words(self, name: str) -> tuple[str, ...]:
        """Also by its name in lower case, as other programs take it."""
        return self.words(name) or self.words(name.lower())

    def bytes(self, name: str) -> int:
        text = self.text(name) or "0"
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise BadSetting(f"{name} is {text!r}; it takes a number of bytes")
        return int(text)

    def count(self, name: str, default: int) -> int:
        text = self.text(name)
        if not text:
            return default
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise BadSetting(f"{name} is {text!r}; it takes a whole number, 0 or more")
        return int(text)

    def size(self, name: str, default: int) -> int:
        text = self.text(name)
        if not text:
            return default
        count = parse_size(text)
        if count is None:
            raise BadSetting(f"{name} is {text!r}; it takes bytes or a size such as 500MB or 1.5TB")
        return count

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        text = self.text(name).lower() or choices[0]
        if text not in choices:
            raise BadSetting(f"{name} is {text!r}; it takes {' or '.join(word for word in choices if word)}")
        return text

    def duration(self, name: str, default: float) -> float:
        text = self.text(name)
        if not text:
            return default
        seconds = parse_seconds(text)
        if seconds is None:
            raise BadSetting(f"{name} is {text!r}; it takes seconds or a duration such as 5m, 90s or 1h30m; below 0 is for ever")
        return seconds


def parse_seconds(text: str) -> float | None:
    """Seconds of a Go duration (`1h30m`) or of a bare whole number; None when it is neither."""
    if re.fullmatch(r"[+-]?[0-9]{1,12}", text):
        return float(text)
    try:
        return parse_duration(text)
    except ValueError:
        return None


def parse_size(text: str) -> int | None:
    """Bytes of `500`, `500MB` or `1.5 TB`, in powers of 1000 as sizes are shown; None when it is no size."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]?)B?", text.strip().upper())
    return None if match is None else int(Decimal(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def parse_ollama_host(text: str, *, warn: Callable[[str], None] = lambda _: None) -> Address:
    """`OLLAMA_HOST` as Ollama reads it: any of `host`, `host:port`, `:port`, `[v6]:port` or a URL. A port that is none becomes
    the default one, with a warning. Source: ollama envconfig/config.go Host."""
    scheme, has_scheme, rest = text.partition("://")
    default_port = {"http": 80, "https": 443}.get(scheme, _LOCAL_PORT) if has_scheme else _LOCAL_PORT
    if not has_scheme:
        scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
    authority, _, path = rest.partition("/")
    host, port_text = _split_host_port(authority)
    # Ollama would take any text as a host and fail much later, in the resolver.
    is_host = not host or (re.fullmatch(r"[A-Za-z0-9._~%-]*", host) and is_lookable(host)) or _is_ipv6(host)
    if scheme not in ("http", "https") or not is_host:
        raise BadSetting(f"OLLAMA_HOST is {text!r}; it takes an address such as 127.0.0.1:11434 or http://host:11434")
    port = default_port
    if port_text is not None:
        if re.fullmatch(r"[0-9]{1,5}", port_text) and int(port_text) <= 65535:
            port = int(port_text)
        else:
            warn(f"OLLAMA_HOST names the port {port_text!r}, which is none; using {default_port}")
    return Address(scheme=scheme, host=host or "127.0.0.1", port=port, path=f"/{path.rstrip('/')}" if path.rstrip("/") else "")


def parse_hub_url(text: str, *, where: str) -> str:
    """A hub's base URL, without trailing slash; a bare host name means https, a bare loopback address http.
    where: what to blame. Raises: BadSetting."""
    if "://" not in text:
        host = _split_host_port(text.split("/", 1)[0])[0]
        is_here = Address(scheme="http", host=host, port=0).is_loopback
        text = f"{'http' if is_here else 'https'}://{text}"
    if "@" in text:
        raise BadSetting(f"{where} takes the hub's address without a user name or password")  # which must not be repeated here
    parts = _split_url(text)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or not is_lookable(parts.hostname):
        raise BadSetting(f"{where} is {text!r}; it takes the hub's address, such as https://hub.example.org")
    if parts.query or parts.fragment or parts.path.strip("/"):
        raise BadSetting(f"{where} is {text!r}; it takes the hub's address alone, without a path")
    return f"{parts.scheme}://{parts.netloc.lower()}"


def parse_upstream_url(text: str, *, where: str) -> str:
    """The base URL of a server that runs models, without trailing slash and without the `/v1` that such addresses are often given
    with. where: what to blame. Raises: BadSetting."""
    if "@" in text:
        raise BadSetting(f"{where} takes the server's address without a user name or password")  # which must not be repeated here
    # urlsplit takes what no line of a request can hold.
    parts = _split_url(text) if text.isprintable() and " " not in text else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or not is_lookable(parts.hostname):
        raise BadSetting(f"{where} is {text!r}; it takes a server's address, such as http://10.0.0.7:8000")
    if parts.query or parts.fragment:
        raise BadSetting(f"{where} is {text!r}; it takes the server's address without ? and #")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def _split_host_port(authority: str) -> tuple[str, str | None]:
    """The host without brackets, and the text behind the colon, or None when there is no port."""
    if authority.startswith("["):
        host, _, rest = authority[1:].partition("]")
        return host, rest[1:] if rest.startswith(":") else None
    if authority.count(":") == 1:
        host, _, port = authority.partition(":")
        return host, port
    return authority, None  # no colon, or a bare IPv6 literal


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _listen_address(name: str, text: str) -> Address:
    if not text:
        return Address(scheme="http", host="127.0.0.1", port=_HUB_PORT)
    host, port = _split_host_port(text)
    if "/" in text or (port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) <= 65535)):
        raise BadSetting(f"{name} is {text!r}; it takes an address and a port, such as 127.0.0.1:{_HUB_PORT}")
    return Address(scheme="http", host=host or "127.0.0.1", port=int(port) if port else _HUB_PORT)


def _public_url(text: str, listen: Address) -> str:
    """The URL that people and devices use for the hub. It goes into links and tokens, so it is never taken from a request."""
    if not text:
        if not listen.is_loopback:
            raise BadSetting(
                f"the hub listens on {listen.bind}, which others can reach, so CORRAL_PUBLIC_URL must say how they do: "
                "an https address such as https://hub.example.org"
            )
        return f"http://localhost:{listen.port}"
    url = parse_hub_url(text, where="CORRAL_PUBLIC_URL")
    if url.startswith("http://") and not (listen.is_loopback and _is_loopback_url(url)):
        raise BadSetting(
            f"CORRAL_PUBLIC_URL is {text!r}; a hub that others can reach needs https, so that no password travels in the open"
        )
    return url


def _trusted_proxies(words: Sequence[str], listen: Address, public_url: str) -> tuple[Network, ...]:
    """Whose forwarded headers are believed. A public hub on loopback has a proxy before it; unless that is named, all the world
    would seem to call from this machine, over a line that nobody can listen on (T17)."""
    proxies = _networks("CORRAL_TRUSTED_PROXIES", words)
    if not listen.is_loopback or _is_loopback_url(public_url):
        return proxies
    # Whatever address of 127.0.0.0/8 is called, the caller's own is 127.0.0.1. A name may stand for either family.
    callers = ["::1"] if ":" in listen.host else ["127.0.0.1"] if listen.host[:1].isdigit() else ["127.0.0.1", "::1"]
    if not all(any(ipaddress.ip_address(caller) in proxy for proxy in proxies) for caller in callers):
        raise BadSetting(
            f"CORRAL_PUBLIC_URL is {public_url} and the hub listens on {listen.bind}, so a proxy stands before it: "
            f"set CORRAL_TRUSTED_PROXIES={','.join(callers)} and have the proxy set X-Forwarded-For and X-Forwarded-Proto"
        )
    return proxies


def _mirror_rule(number: int, text: str) -> MirrorRule:
    """One rule of `CORRAL_MIRROR`, a comma-separated list of `NAMESPACE/PATTERN=URL[/PREFIX]`; see wire.mirrors. number: its
    place there, from 1."""
    names, equals, _ = text.partition("=")
    # The address behind it may hold a password, and so may anything that is no rule at all.
    shown = f"rule {number} ({names.strip()}=…)" if equals and not set("@:?") & set(names) else f"rule {number}"
    try:
        rule = parse_mirror_rule(text)
    except CorralError as error:
        raise BadSetting(f"CORRAL_MIRROR cannot be read at {shown}: {error.message}") from error
    # What a tag points at is only as trustworthy as the line it was asked over, and everybody gets it from us afterwards.
    if rule.base_url.startswith("http://") and not _is_loopback_url(rule.base_url):
        raise BadSetting(f"CORRAL_MIRROR names an upstream by http in {shown}; only https is safe beyond this machine")
    return rule


def _is_loopback_url(url: str) -> bool:
    return Address(scheme="http", host=urlsplit(url).hostname or "", port=0).is_loopback


def _database_url(text: str) -> str:
    if not text:
        return ""
    parts = _split_url(text)
    if parts is None or parts.scheme.split("+")[0] not in ("sqlite", "postgresql"):
        # The value is not repeated: it may hold a password.
        raise BadSetting("CORRAL_DATABASE_URL takes sqlite:///path or postgresql://user@host/name")
    return text


def _split_url(text: str) -> SplitResult | None:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return None
    return parts


def _debug_level(text: str) -> int:
    if text.isascii() and text.isdigit():
        return min(int(text), 2)
    return 0 if not text or text in _FALSE else 1


def _networks(name: str, words: Sequence[str]) -> tuple[Network, ...]:
    text = ""
    try:
        return tuple(ipaddress.ip_network(text := word) for word in words)
    except ValueError:
        raise BadSetting(f"{name} holds {text!r}; it takes addresses and networks, such as 10.0.0.0/8") from None


def _days(name: str, count: int) -> int:
    if count > _MOST_DAYS:
        raise BadSetting(f"{name} is {count}; it takes a number of days, at most {_MOST_DAYS}, or 0")
    return count


def _api_key(text: str) -> Secret | None:
    """Raises: BadSetting for what no header can carry, as two lines of a file. It is not repeated."""
    if not is_sendable(text):
        raise BadSetting("OLLAMA_API_KEY has a line break or another character in it that no key has; set it to the key alone")
    return Secret(text) if text else None


def _hub(ours: str, ollamas: str, *, warn: Callable[[str], None]) -> str:
    """`CORRAL_HUB`, else `OLLAMA_CLOUD_BASE_URL`; a value of the latter that Ollama would not take is ignored with a warning, as
    there. Source: ollama server/cloud_proxy.go resolveCloudProxyBaseURL."""
    if ours:
        return parse_hub_url(ours, where="CORRAL_HUB")
    if not ollamas:
        return ""
    try:
        if "://" not in ollamas:
            raise BadSetting("OLLAMA_CLOUD_BASE_URL takes an address with its scheme, such as https://hub.example.org")
        hub = parse_hub_url(ollamas, where="OLLAMA_CLOUD_BASE_URL")
        if hub.startswith("http://") and not _is_loopback_url(hub):
            raise BadSetting("OLLAMA_CLOUD_BASE_URL takes an https address, or one of this machine")
    except BadSetting as error:
        warn(f"{error.message}; it is ignored")
        return ""
    return hub


def _search_url(text: str) -> str:
    """Where a SearXNG answers searches; without `/search` it is added."""
    parts = _split_url(text)
    if not text:
        return ""
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        # The value is not repeated: it may hold a password.
        raise BadSetting("CORRAL_SEARCH_URL takes the address of a SearXNG, such as http://127.0.0.1:8888/search")
    return text if parts.path.strip("/") else f"{text.rstrip('/')}/search"


def _path(text: str, home: Path, *, default: Path) -> Path:
    if not text:
        return default
    if text == "~" or text.startswith("~/"):
        return home / text[2:]
    return Path(text)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
