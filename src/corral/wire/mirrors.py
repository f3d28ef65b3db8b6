"""Which repositories a hub mirrors from where: the rules of `CORRAL_MIRROR`.

A rule is `NAMESPACE/PATTERN=URL[/PREFIX]`, where `*` in the pattern stands for anything:

```
library/*=https://registry.ollama.ai            library/tiny       is library/tiny there: without a path the name stays whole
docker.io/*=https://registry-1.docker.io/       docker.io/a/b      is a/b there: a path takes the namespace's place
friends/tiny*=https://hub.example/ana           friends/tiny-1     is ana/tiny-1 there
```
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from corral.wire.errors import CorralError
from corral.wire.repositories import RepositoryName, parse_repository

_NAMESPACE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,79}")
_PATTERN = re.compile(r"[a-z0-9_.*/-]{1,200}")
_PREFIX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
#: Each star of a pattern may multiply the work of matching a name.
_MAX_STARS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorRule:
    """One upstream for some names of one namespace. namespace, pattern: lower case. base_url: scheme, host and port. prefix: what
    takes the namespace's place there, None where the name stays whole."""

    namespace: str
    pattern: str
    base_url: str
    prefix: str | None = None

    def path_of(self, name: RepositoryName) -> str | None:
        """What the repository is called upstream; None when the rule is not about it."""
        key = name.key
        if key.namespace != self.namespace or not _matcher(self.pattern).fullmatch(key.name):
            return None
        return str(name) if self.prefix is None else f"{self.prefix}/{name.name}".removeprefix("/")


def upstream_of(rules: Iterable[MirrorRule], name: RepositoryName) -> tuple[str, str] | None:
    """The base URL and path that the first matching rule gives; None when no rule allows it."""
    found = ((rule.base_url, rule.path_of(name)) for rule in rules)
    return next(((base_url, path) for base_url, path in found if path is not None), None)


def parse_mirror_rule(text: str) -> MirrorRule:
    """Read one rule. Raises: invalid, with a sentence that does not repeat the value, which may hold a password."""
    local, equals, url = text.partition("=")
    namespace, slash, pattern = local.strip().lower().partition("/")
    if not (equals and slash and _NAMESPACE.fullmatch(namespace) and _PATTERN.fullmatch(pattern)):
        raise _bad("a rule is NAMESPACE/PATTERN=URL, such as library/*=https://registry.ollama.ai")
    if pattern.count("*") > _MAX_STARS:
        raise _bad(f"a pattern has at most {_MAX_STARS} stars")
    base_url, path = _split_url(url.strip())
    prefix = path.strip("/")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise _bad("the path of an upstream is the beginning of a repository's name")
    rule = MirrorRule(namespace=namespace, pattern=pattern, base_url=base_url, prefix=prefix if path else None)
    _check_example(rule)
    return rule


def _split_url(url: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_plain = False
    if not is_plain or "@" in parts.netloc or parts.query or parts.fragment or not (url.isascii() and url.isprintable()):
        raise _bad("an upstream is an http or https address without user name, password or query")
    return f"{parts.scheme}://{parts.netloc.lower()}", parts.path


def _check_example(rule: MirrorRule) -> None:
    """Refuse a rule that no name could match, rather than let somebody wonder why nothing is mirrored."""
    try:
        parse_repository(f"{rule.namespace}/{rule.pattern.replace('*', 'a')}")
    except CorralError as error:
        raise _bad("no repository can be called like that") from error


def _matcher(pattern: str) -> re.Pattern[str]:
    # re keeps compiled patterns; there are as many of these as an operator cared to write.
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")))


def _bad(reason: str) -> CorralError:
    return CorralError("invalid", reason)
