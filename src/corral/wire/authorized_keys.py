"""The `authorized_keys` of a shared local server: who may call it, one line each, in the form that sshd made known.

    [options] ssh-ed25519 AAAA… comment          a device, by its public key
    [options] key-sha256 <64 hex digits> comment  an API key (`crlk_…`), by its digest: the key itself is kept by its holder alone

Options stand before the key, separated by commas without spaces: `rights=read|use|manage` (`use` when nothing is said), `cloud`,
`models="llama*,qwen3:*"`, `expires="2027-01-31"`, `from="192.168.0.0/16"`. Names of options have no case. A line that is not
understood whole grants nothing: an option that was meant to narrow something must never be passed over. What is said about such a
line names its number and never repeats what could be a secret. Source: sshd(8), AUTHORIZED_KEYS FILE FORMAT.
"""

import hashlib
import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from corral.wire.apikeys import ApiKeyText, parse_api_key
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey, parse_authorized_key
from corral.wire.text import shown_name

DEVICE: Final = "ssh-ed25519"
API_KEY: Final = "key-sha256"
#: No line that means something is longer.
_MAX_LINE: Final = 8192
#: So much of a digest tells one's keys apart.
_SHORT_DIGEST: Final = 16
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_OPTION: Final = re.compile(r"(?P<name>[A-Za-z-]{1,24})(?:=(?:\"(?P<quoted>[^\"\\]*)\"|(?P<bare>[^\s\",]+)))?")
#: Shown in a complaint: nothing that looks like this is a key or a part of one.
_HARMLESS_NAME: Final = re.compile(r"[a-z][a-z-]{1,19}")
_PATTERN: Final = re.compile(r"[A-Za-z0-9_.*?-]+(?:[/:][A-Za-z0-9_.*?-]+)*")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Right(StrEnum):
    """What a line lets its holder do; each holds what stands before it."""

    READ = "read"
    USE = "use"
    MANAGE = "manage"

    def covers(self, other: "Right") -> bool:
        """Whether whoever may do this may do the other, too."""
        order = list(Right)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What stands before a key. models: patterns in lower case, none for every model. has_cloud: whether the server's own account
    at its hub may be used; who may manage always may. expires_at: aware, None for never. networks: none for everywhere."""

    right: Right = Right.USE
    has_cloud: bool = False
    models: tuple[str, ...] = ()
    expires_at: datetime | None = None
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizedKey:
    """A line that was understood. number: of the line, from 1. key: of a device, or digest: SHA-256 of an API key's text.
    comment: fit to be shown and logged, maybe empty."""

    number: int
    terms: Terms
    comment: str
    key: DevicePublicKey | None = None
    digest: bytes = b""

    @property
    def fingerprint(self) -> str:
        """A device's as `ssh-keygen -lf` prints it; of an API key the beginning of its digest, which gives nothing away."""
        return self.key.fingerprint if self.key else short_digest(self.digest)

    @property
    def name(self) -> str:
        """What it is called: by its comment, else by its fingerprint."""
        return self.comment or self.fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizedKeys:
    """A whole file. complaints: a sentence for each line that grants nothing though it is no comment."""

    entries: tuple[AuthorizedKey, ...] = ()
    complaints: tuple[str, ...] = ()


def key_digest(key: ApiKeyText) -> bytes:
    """What stands in the file for an API key. Its 190 random bits cannot be guessed, so that nothing slower is needed."""
    return hashlib.sha256(key.text.reveal().encode()).digest()


def short_digest(digest: bytes) -> str:
    """How an API key is called that has no other name."""
    return f"{API_KEY}:{digest.hex()[:_SHORT_DIGEST]}"


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Malformed(ValueError):
    """What is wrong with a line; holds nothing of it that could be secret."""


def parse_authorized_keys(content: bytes) -> AuthorizedKeys:
    """Everything that is understood, in its order. Never raises."""
    entries: list[AuthorizedKey] = []
    complaints: list[str] = []
    for number, line in enumerate(content.decode("utf-8-sig", "replace").split("\n"), 1):
        try:
            entry = _parse_line(number, line.removesuffix("\r").replace("\t", " ").strip(" "))
        except _Malformed as error:
            complaints.append(f"line {number} grants nothing: {error}")
        else:
            entries += [entry] if entry else []
    return AuthorizedKeys(entries=tuple(entries), complaints=tuple(complaints))


def _parse_line(number: int, line: str) -> AuthorizedKey | None:
    """None for a comment. Raises: _Malformed."""
    if not line or line.startswith("#"):
        return None
    if len(line) > _MAX_LINE or not line.isprintable():
        raise _Malformed("it is too long, or holds characters that no such line has")
    terms, rest = Terms(), line
    if line.split(maxsplit=1)[0] not in (DEVICE, API_KEY):
        terms, rest = _parse_options(line)
    kind, text, comment = (*rest.split(maxsplit=2), "", "")[:3]
    return _entry(number, terms, kind, text, shown_name(comment))


def _entry(number: int, terms: Terms, kind: str, text: str, comment: str) -> AuthorizedKey:
    if kind == DEVICE:
        try:
            return AuthorizedKey(number=number, terms=terms, comment=comment, key=parse_authorized_key(f"{kind} {text}"))
        except CorralError as error:
            raise _Malformed("its public key is damaged") from error
    if kind == API_KEY:
        if not _HEX.fullmatch(text):
            raise _Malformed("64 hex digits in lower case belong behind key-sha256")
        return AuthorizedKey(number=number, terms=terms, comment=comment, digest=bytes.fromhex(text))
    raise _Malformed("its key is neither ssh-ed25519 nor key-sha256")


def _parse_options(line: str) -> tuple[Terms, str]:
    """(what the options say, the rest of the line from the key on). Raises: _Malformed."""
    if parse_api_key(line.split(maxsplit=1)[0]) is not None:
        raise _Malformed("it holds an API key itself, which others may have read by now; make another: corral authorize key")
    fields: dict[str, object] = {}
    at = 0
    while True:
        match = _OPTION.match(line, at)
        if match is None:
            raise _Malformed("its options are not understood")
        name, value = match["name"].lower(), match["quoted"] if match["quoted"] is not None else match["bare"]
        field, parse = _OPTIONS.get(name, ("", _unknown))
        if not field:
            shown = f' "{name}"' if _HARMLESS_NAME.fullmatch(name) else ""
            raise _Malformed(f"it has an option{shown} that is not known here")
        if field in fields:
            raise _Malformed(f'it says "{name}" twice')
        fields[field] = parse(value)
        at = match.end()
        if line[at : at + 1] != ",":
            break
        at += 1
    if line[at : at + 1] != " ":
        raise _Malformed("its options are not understood, or nothing follows them")
    return Terms(**fields), line[at:].strip()  # type: ignore[arg-type]  # each parser gives what its field takes


def _unknown(_: str | None) -> object:
    raise AssertionError("asked for nothing")


def _right(value: str | None) -> Right:
    try:
        return Right(value or "")
    except ValueError as error:
        raise _Malformed(f"rights is one of {', '.join(Right)}") from error


def _switch(value: str | None) -> bool:
    if value is not None:
        raise _Malformed("cloud takes no value")
    return True


def _models(value: str | None) -> tuple[str, ...]:
    patterns = _words(value)
    if not patterns or not all(_PATTERN.fullmatch(pattern) for pattern in patterns):
        raise _Malformed('models takes names in which * and ? may stand, such as models="llama*,qwen3:*"')
    return tuple(pattern.lower() for pattern in patterns)


def _networks(value: str | None) -> tuple[Network, ...]:
    try:
        networks = tuple(ipaddress.ip_network(word) for word in _words(value))
    except ValueError as error:
        raise _Malformed('from takes addresses and networks, such as from="192.168.0.0/16"') from error
    if not networks:
        raise _Malformed('from takes addresses and networks, such as from="192.168.0.0/16"')
    return networks


def _expiry(value: str | None) -> datetime:
    try:
        # A day alone means its first moment, as it does for sshd and for our API keys.
        when = datetime.fromisoformat(value or "")
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise _Malformed('expires takes a date or a time, such as expires="2027-01-31"') from error


def _words(value: str | None) -> Sequence[str]:
    return [word.strip() for word in (value or "").split(",") if word.strip()]


#: option -> (field of Terms, what reads its value).
_OPTIONS: Final[dict[str, tuple[str, Callable[[str | None], object]]]] = {
    "rights": ("right", _right),
    "cloud": ("has_cloud", _switch),
    "models": ("models", _models),
    "expires": ("expires_at", _expiry),
    "from": ("networks", _networks),
}


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_terms(
    *, right: str = "", models: str = "", expires_at: datetime | None = None, networks: str = "", has_cloud: bool = False
) -> Terms:
    """Terms of what a person typed; nothing where it is empty. Raises: bad_request."""
    try:
        return Terms(
            right=_right(right) if right else Right.USE,
            has_cloud=has_cloud,
            models=_models(models) if models else (),
            expires_at=expires_at,
            networks=_networks(networks) if networks else (),
        )
    except _Malformed as error:
        raise CorralError("bad_request", str(error)) from error


def format_line(terms: Terms, key: DevicePublicKey | bytes, comment: str) -> str:
    """A line that is read back as it was meant. key: a device's, or the digest of an API key. comment: see `shown_name`."""
    options = [f"rights={terms.right}"] if terms.right is not Right.USE else []
    options += ["cloud"] if terms.has_cloud else []
    options += [f'models="{",".join(terms.models)}"'] if terms.models else []
    options += [f'expires="{_date_text(terms.expires_at)}"'] if terms.expires_at else []
    options += [f'from="{",".join(map(str, terms.networks))}"'] if terms.networks else []
    what = key.authorized_key if isinstance(key, DevicePublicKey) else f"{API_KEY} {key.hex()}"
    return " ".join(part for part in (",".join(options), what, comment) if part)


def _date_text(when: datetime) -> str:
    text = when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return text.removesuffix("T00:00:00Z")


def with_line(content: bytes, line: str) -> bytes:
    """The file with one more line at its end; everything else as it is."""
    return content + (b"" if content.endswith(b"\n") or not content else b"\n") + line.encode() + b"\n"


def without_lines(content: bytes, numbers: Sequence[int]) -> bytes:
    """The file without those lines; everything else, also what is not understood, as it is."""
    return b"".join(line for number, line in enumerate(_lines(content), 1) if number not in numbers)


def _lines(content: bytes) -> list[bytes]:
    """With their ends, cut where the reader cuts them."""
    return [part + b"\n" for part in content.split(b"\n")[:-1]] + [content.rpartition(b"\n")[2]]
