"""What a browser sends and must be sent: where a request came from, where it may be sent on to, and cookies. Pure.

The header of fetch metadata (`Sec-Fetch-Site`) is set by the browser and cannot be forged by a page; browsers that do not send it
(old ones, and all of them over plain http off loopback) send `Origin` with every request that is not GET or HEAD. A request with
neither did not come from a page of ours.
"""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

SAFE_METHODS = frozenset({"GET", "HEAD"})

# ── Where a request came from ────────────────────────────────────────────────────────────────────────────────────────


def origin_of(url: str) -> str:
    """`scheme://host[:port]` as a browser writes it: lower case, without the scheme's default port."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    is_default = parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme))
    return f"{parts.scheme}://{host}" if is_default else f"{parts.scheme}://{host}:{parts.port}"


def is_same_origin(headers: Mapping[str, Sequence[str]], public_url: str) -> bool:
    """Whether a page of our own sent this request. headers: lower-case names. Absent, repeated or foreign headers mean no
    (T79)."""
    sites = headers.get("sec-fetch-site")
    if sites:
        # `none` (typed into the address bar) is no page of ours either; it cannot be the source of a POST.
        return list(sites) == ["same-origin"]
    return list(headers.get("origin", ())) == [origin_of(public_url)]


# ── Where a browser may be sent on to ────────────────────────────────────────────────────────────────────────────────

# Printable ASCII that begins with exactly one slash. A backslash counts as a slash to browsers, and a control character is
# dropped by them before they read the rest.
_OWN_TARGET = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*")
# What would become a slash, a backslash or a line end if something on the way decoded it once.
_ENCODED = re.compile(r"%(?:0[0-9a-f]|1[0-9a-f]|5c|7f)|^/%2f", re.IGNORECASE)
_MAX_TARGET = 2048


def safe_next(text: str) -> str:
    """The place to go on to after signing in, or `/` for whatever is not plainly a path on this server (T80)."""
    if len(text) > _MAX_TARGET or not _OWN_TARGET.fullmatch(text) or _ENCODED.search(text):
        return "/"
    path = text.partition("?")[0].partition("#")[0]
    return "/" if "//" in path else text


# ── Cookies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def session_cookie_name(public_url: str) -> str:
    """`__Host-corral` over TLS: browsers take that name only with Secure, Path=/ and no Domain, so no other host can plant it.
    `corral-<port>` otherwise: cookies know no ports, and hubs on one machine would overwrite each other's."""
    if public_url.startswith("https://"):
        return "__Host-corral"
    return f"corral-{urlsplit(public_url).port or 80}"


def cookie_values(headers: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """Every value sent under one cookie name, in order."""
    pairs = (pair.strip().partition("=") for header in headers.get("cookie", ()) for pair in header.split(";"))
    return [value.strip() for key, _, value in pairs if key == name]


def format_cookie(name: str, value: str, *, max_age_s: int) -> str:
    """A Set-Cookie value that only this server's own pages get back. max_age_s: 0 removes the cookie."""
    secure = "; Secure" if name.startswith("__Host-") else ""
    return f"{name}={value}; Path=/; Max-Age={max_age_s}; HttpOnly; SameSite=Lax{secure}"
