"""Passwords: which are good enough, and how they are kept.

Length is what counts (NIST 800-63B-4, ASVS 6.2): 15 characters, no rules about their kinds, nothing cut off. Refused besides
is what an attacker tries first: well-known ones, one piece repeated, and those made of little more than our names or the
account's own.
"""

import asyncio
import unicodedata
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError
from argon2.low_level import Type

from corral.core.ports import Entropy
from corral.wire.errors import CorralError

MIN_CHARACTERS = 15
RULE = f"a password needs at least {MIN_CHARACTERS} characters; several words are a good one"
MAX_BYTES = 1024
#: Fewer different characters than this make a password that is found by trying patterns.
_MIN_DISTINCT = 5
#: How many different characters must be left when every word of `_OBVIOUS` and of the account, and every run, is taken out.
_MIN_OWN = 6

# Pieces that long passwords of the public lists are made of, and our own words. Longest first, so that `passwords` goes before
# `password`. Runs of the keyboard are listed because they have enough different characters to pass for random ones.
_OBVIOUS = sorted(
    """
    abc123 123123 112233 121212 qwertyuiopasdfghjklzxcvbnm qwertyuiop asdfghjkl zxcvbnm qwertzuiop azertyuiop qazwsxedc 1qaz2wsx
    1q2w3e4r5t q1w2e3r4 qwerty qwertz azerty asdfgh zxcvbn asdf
    administrator changeme correcthorsebatterystaple default football baseball dragon iloveyou letmein login master monkey mustang
    passphrase passw0rd password passwort princess secret shadow starwars sunshine superman trustno1 welcome whatever
    corral ollama llama localhost library inference account server settings signin signup
    """.split(),  # noqa: SIM905 - a list of seventy quoted words is harder to read
    key=len,
    reverse=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordCost:
    """What one hash takes. The default is OWASP's floor for argon2id: 19 MiB, some 27 ms."""

    time_cost: int = 2
    memory_kib: int = 19 * 1024
    parallelism: int = 1


def check_password(password: str, *, own_words: tuple[str, ...]) -> None:
    """Refuse a password that is easy to guess. own_words: the account's name and e-mail address. Raises: invalid."""
    text = _normalised(password)
    if len(text) < MIN_CHARACTERS:
        raise _unacceptable(RULE)
    if _is_easily_guessed(text.casefold(), own_words):
        raise _unacceptable("that password is easy to guess; several words that do not belong together are a good one")


def _unacceptable(message: str) -> CorralError:
    return CorralError("invalid", message, detail={"field": "password"})


def _normalised(password: str) -> str:
    """The form that is counted and hashed: the same characters typed on two systems arrive in different compositions."""
    if len(password) > MAX_BYTES:
        raise _unacceptable(f"a password may have at most {MAX_BYTES} bytes")
    text = unicodedata.normalize("NFC", password)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _unacceptable("that password holds a character that cannot be kept") from error
    if size > MAX_BYTES:
        raise _unacceptable(f"a password may have at most {MAX_BYTES} bytes")
    return text


def _is_easily_guessed(text: str, own_words: tuple[str, ...]) -> bool:
    # A text is one piece repeated when it is found inside itself doubled, its two ends cut off.
    if len(set(text)) < _MIN_DISTINCT or text in (text + text)[1:-1]:
        return True
    rest = text
    own = [part for word in own_words for part in word.casefold().replace("@", ".").split(".")]
    for word in [*sorted((part for part in own if len(part) >= 3), key=len, reverse=True), *_OBVIOUS]:
        rest = rest.replace(word, "")
    # What continues a run (4567, cba, ...) was not chosen.
    chosen = {second for first, second in pairwise("\0" + rest) if abs(ord(second) - ord(first)) > 1}
    return len(chosen) < _MIN_OWN


class Passwords:
    """Hashes and checks passwords in threads, a bounded number at a time: each takes memory and a whole core."""

    def __init__(self, cost: PasswordCost, entropy: Entropy, *, at_once: int = 2) -> None:
        self._hasher = PasswordHasher(
            time_cost=cost.time_cost, memory_cost=cost.memory_kib, parallelism=cost.parallelism, type=Type.ID
        )
        self._entropy = entropy
        self._slots = asyncio.Semaphore(at_once)
        # A hash of the right cost that no password has, so that an unknown name takes the time of a known one (T69).
        self._nobody = self._hasher.hash(entropy.bytes(32), salt=entropy.bytes(16))

    async def hash(self, password: str) -> str:
        """The text to keep. Raises: invalid when it is too long or cannot be kept."""
        text = _normalised(password)
        async with self._slots:
            return await asyncio.to_thread(partial(self._hasher.hash, text, salt=self._entropy.bytes(16)))

    async def is_right(self, password: str, kept: str) -> bool:
        """Whether the password has this hash. kept: empty for an account that does not exist, which costs just as much."""
        try:
            text = _normalised(password)
        except CorralError:
            return False  # no account can have it, and one sentence must serve for all that is wrong
        async with self._slots:
            matches = await asyncio.to_thread(self._matches, kept or self._nobody, text)
        return matches and bool(kept)

    def _matches(self, kept: str, text: str) -> bool:
        try:
            return self._hasher.verify(kept, text)
        except VerifyMismatchError:
            return False
        except (VerificationError, InvalidHashError) as error:
            raise CorralError(
                "unavailable", "the stored password cannot be read; ask an administrator to set a new one"
            ) from error

    def is_outdated(self, kept: str) -> bool:
        """Whether the hash was made at another cost than today's."""
        return self._hasher.check_needs_rehash(kept)
