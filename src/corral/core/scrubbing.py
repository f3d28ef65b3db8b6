"""Reading again what is kept: whether a blob still is what its digest says, and what its owner loses when it is not."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from corral.wire.names import Digest

#: Told of bytes that were just read; waits for as long as the disk is to be left alone.
Pace = Callable[[int], Awaitable[None]]


class Condition(StrEnum):
    """What a blob was found to be."""

    INTACT = "intact"
    #: Its bytes are others, or of another number; it is not served any more.
    DAMAGED = "damaged"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobToCheck:
    """A blob that somebody has. is_damaged: as it was found before."""

    digest: Digest
    size_bytes: int
    is_damaged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HurtBlob:
    """A blob that is not what it should be. models: `namespace/name:tag` of everything that names it, `…@digest` where there is
    no tag; of repositories that only hold it, `namespace/name`."""

    digest: Digest
    size_bytes: int
    since: datetime
    models: tuple[str, ...]


#: Every blob that was found damaged and is still wanted, asked for anew by whoever shows it.
HurtBlobs = Callable[[], Awaitable[Sequence[HurtBlob]]]


@dataclass(slots=True)
class ScrubProgress:
    """How far a scrub is. total_bytes: of the blobs that were due when it began."""

    total_bytes: int
    blobs: int = 0
    done_bytes: int = 0


class ScrubStore(Protocol):
    """What is known of the condition of blobs."""

    async def blobs_to_check(self, *, checked_before: datetime, limit: int, after: str = "") -> Sequence[BlobToCheck]:
        """Blobs that a repository has, placed and last checked before then, and all that were found damaged; by digest, behind
        `after`."""
        ...

    async def bytes_to_check(self, *, checked_before: datetime) -> int:
        """Of all those."""
        ...

    async def note_check(self, digest: Digest, *, at: datetime, is_damaged: bool) -> None: ...

    async def hurt_blobs(self) -> Sequence[HurtBlob]:
        """Every blob that was found damaged and is still wanted, by digest."""
        ...


class ScrubFiles(Protocol):
    """The blobs' files, read from the disk and not from the kernel's memory of them."""

    async def check(self, digest: Digest, size_bytes: int, pace: Pace) -> Condition:
        """Read and hash it; one that is wrong is set aside, and nobody gets at it from then on. One that was set aside before and
        is right, as after a repair, is put back."""
        ...

    async def forget_aside(self, digest: Digest) -> None:
        """Remove what was set aside of it: a whole one took its place."""
        ...
