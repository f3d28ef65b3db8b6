"""How many parts a JSON text has, told without making them. Pure.

What a body takes in memory has little to do with its length: `{},` is three bytes, and as a message half a kilobyte, so 20 MB of
it would take a server's memory and a minute (security.md T106). The text is looked over once, with its strings passed over whole.
"""

import re
from itertools import islice
from typing import Final

from corral.wire.errors import CorralError

#: Objects, lists and nulls of one request: more than any chat has, and made in half a second.
MAX_PARTS: Final = 120_000

# Up to the next part, over so many strings and other pieces at most, since nothing else runs meanwhile. What is taken is not
# given back (`++`, `+` behind a count), so the time depends on the length alone.
_PART: Final = re.compile(rb'(?:[^"{\[n]++|"(?:[^"\\]++|\\.)*+"?|n(?!ull)){0,4096}+([{\[]|null)?', re.DOTALL)


def check_parts(text: bytes) -> None:
    """Refuse a text of too many parts; whether it is JSON is not asked. Raises: too_large."""
    if len(text) <= MAX_PARTS:
        return
    parts = (found for found in _PART.finditer(text) if found[1])
    if next(islice(parts, MAX_PARTS, None), None) is not None:
        raise CorralError("too_large", f"the request body has more than {MAX_PARTS:,} objects, lists and nulls")
