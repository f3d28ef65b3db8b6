"""What is wrong with a key that somebody pasted, in words. They may be shown and logged: of the text they hold how long it is."""

import re
from typing import Final

from corral.wire.apikeys import API_KEY_LENGTH, API_KEY_PREFIX

_QUOTES: Final = "\"'`“”‘’«»"
#: No key is longer; what comes behind is not looked at.
_MOST: Final = 4000
_DEVICE: Final = "ssh-ed25519"
#: The base64 text of an Ed25519 key, and what each begins with.
_BLOB_LENGTH, _BLOB_START = 68, "AAAA"
_BLOB: Final = re.compile(r"[A-Za-z0-9+/=]+")


def fault_of_api_key(text: str) -> str:
    """Why a text is no API key of a hub, as the end of a sentence that says what came: `is cut off: …`."""
    text = text[:_MOST].strip()
    bare = "".join(text.split()).strip(_QUOTES)
    if not bare:
        return "is empty"
    if bare.startswith("ssh-"):
        return "is a public key, where an API key belongs"
    if not bare.startswith(API_KEY_PREFIX):
        return f"is no API key of a Corral hub; those begin with {API_KEY_PREFIX}"
    if wrapping := wrapping_of(text):
        # Said also of what is damaged besides: one thing at a time.
        return f"has {wrapping}"
    if len(bare) != API_KEY_LENGTH:
        return f"is {_wrong_length(len(bare), API_KEY_LENGTH)}"
    return "is damaged: one of its characters is not what it was"


def wrapping_of(text: str) -> str:
    """What stands around or within a key that does not belong to it; empty for nothing. Blanks at the ends do not count."""
    text = text.strip()
    if text.strip(_QUOTES) != text:
        return "quotes around it"
    if len(text.splitlines()) > 1:
        return "a line break in it"
    return "a blank in it" if len(text.split()) > 1 else ""


def fault_of_public_key(text: str) -> str:
    """Why a text is no public key of a device: a whole sentence, without an end."""
    text = text[:_MOST].strip()
    kind, *words = text.split() or [""]
    if kind == _DEVICE:
        return _fault_of_blob(words)
    if not text:
        return "there is no key"
    if text[0] in _QUOTES:
        return "the key has quotes around it"
    if "PRIVATE KEY" in text:
        return "that is a private key, which belongs to nobody else"
    if kind.startswith("SHA256:"):
        return "that is the fingerprint of a key, not the key"
    if kind.startswith(API_KEY_PREFIX):
        return "that is an API key, where the public key of a device belongs"
    if kind.startswith(("ssh-", "ecdsa-", "sk-")):
        return f"that is a key of another kind; a device's begins with {_DEVICE}"
    if kind.startswith(_BLOB_START):
        return f"the key is not whole: {_DEVICE} is missing before it"
    return f"the key is not of the form: {_DEVICE} {_BLOB_START}…"


def _fault_of_blob(words: list[str]) -> str:
    if not words:
        return f"the key is not whole: nothing follows {_DEVICE}"
    blob = words[0].strip(_QUOTES)
    # A comment is what else may follow, and hardly ever of just the length that is missing.
    if len(blob) < _BLOB_LENGTH and len(words) > 1 and _is_blob(_joined(blob, words[1:])):
        return "the key has a line break or a blank in it"
    if len(blob) != _BLOB_LENGTH:
        return f"the key is {_wrong_length(len(blob), _BLOB_LENGTH)}"
    if blob != words[0]:
        return "the key has quotes around it"
    return "the key is not a valid ssh-ed25519 public key: one of its characters is not what it was"


def _joined(blob: str, words: list[str]) -> str:
    for word in words:
        if len(blob) >= _BLOB_LENGTH:
            break
        blob += word
    return blob


def _is_blob(text: str) -> bool:
    return len(text) == _BLOB_LENGTH and _BLOB.fullmatch(text) is not None


def _wrong_length(length: int, wanted: int) -> str:
    return f"cut off: {length} of {wanted} characters" if length < wanted else f"too long: {length} characters, not {wanted}"
