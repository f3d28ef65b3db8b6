"""The `authorized_keys` of this machine's local server, for the commands that show and change it; the server need not run."""

import re
from typing import TYPE_CHECKING

from corral.main.shared import SystemClock, SystemEntropy
from corral.wire.apikeys import ENTROPY_BYTES, make_api_key
from corral.wire.authorized_keys import (
    AuthorizedKey,
    AuthorizedKeys,
    Terms,
    format_line,
    key_digest,
    parse_authorized_keys,
    with_line,
    without_lines,
)
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from corral.wire.signing import DevicePublicKey, parse_authorized_key
from corral.wire.text import shown_name

if TYPE_CHECKING:
    from corral.settings import Settings
    from corral.storage.authorized_keys import AuthorizedKeysFile

_HEADER = b"""\
# Who may use this machine's local server once it runs with CORRAL_LOCAL_AUTH=remote (or on); corral authorize --help.
# [rights=read|use|manage,cloud,models="llama*",expires="2027-01-31",from="192.168.0.0/16"] ssh-ed25519 AAAA... name
"""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def authorized_keys(settings: "Settings") -> AuthorizedKeys:
    """What the file says. Raises: invalid for one that cannot be trusted or read."""
    return parse_authorized_keys(_file(settings).read())


def authorize_device(settings: "Settings", text: str, *, name: str, terms: Terms) -> AuthorizedKey:
    """Add a device. text: a line of a public key file. name: instead of the comment there. Raises: bad_request for what is no
    such line, conflict for a key or a name that is there already, invalid."""
    key = parse_authorized_key(text)
    comment = name or " ".join(text.split()[2:])
    return _add(settings, key, comment, terms)


def authorize_new_key(settings: "Settings", *, name: str, terms: Terms) -> tuple[AuthorizedKey, Secret]:
    """Add an API key that is made now. Its text is kept nowhere. Raises: conflict, invalid."""
    made = make_api_key(SystemEntropy().bytes(ENTROPY_BYTES))
    return _add(settings, key_digest(made), name, terms), made.text


def withdraw(settings: "Settings", wanted: str) -> AuthorizedKey:
    """Remove what has that name, fingerprint or digest; refused from the next request on. Raises: not_found, conflict for a name
    that several keys have, invalid."""
    with _file(settings).edited() as edit:
        entries = parse_authorized_keys(edit.content).entries
        found = [entry for entry in entries if wanted == entry.fingerprint or _is_digest(entry, wanted)]
        found = found or [entry for entry in entries if entry.name == wanted]
        if not found:
            raise CorralError("not_found", f'there is no key "{wanted}" → corral authorize list')
        fingerprints = dict.fromkeys(entry.fingerprint for entry in found)
        if len(fingerprints) > 1:
            raise CorralError(
                "conflict", f'{len(fingerprints)} keys have the name "{wanted}" → use one of {", ".join(fingerprints)}'
            )
        # The same key on another line, under whatever name, would let its holder in all the same.
        edit.content = without_lines(edit.content, [entry.number for entry in entries if entry.fingerprint in fingerprints])
        return found[0]


def _is_digest(entry: AuthorizedKey, wanted: str) -> bool:
    return _DIGEST.fullmatch(wanted) is not None and entry.digest == bytes.fromhex(wanted)


def _add(settings: "Settings", key: DevicePublicKey | bytes, comment: str, terms: Terms) -> AuthorizedKey:
    shown = shown_name(comment)
    if not shown:
        raise CorralError("bad_request", "a key needs a name that can be shown → --name NAME")
    with _file(settings).edited() as edit:
        line = format_line(terms, key, shown)
        for entry in parse_authorized_keys(edit.content).entries:
            if key in (entry.key, entry.digest):
                text = f'that key is there already, as "{entry.name}" → corral authorize remove {entry.fingerprint}'
                raise CorralError("conflict", text)
            if entry.name == shown:
                raise CorralError("conflict", f'there is a key "{shown}" already → give this one another --name')
        edit.content = with_line(edit.content or _HEADER, line)
        # What is told is what was written, read as the server reads it.
        return parse_authorized_keys(edit.content).entries[-1]


def _file(settings: "Settings") -> "AuthorizedKeysFile":
    from corral.storage.authorized_keys import AuthorizedKeysFile

    return AuthorizedKeysFile(settings.authorized_keys, SystemClock())
