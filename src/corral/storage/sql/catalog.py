"""Descriptions, counters of pulls, listings and search, in the database.

Visibility is read from the registry's own rows by every query here; the search index only narrows. A listing walks an index of
repositories from its beginning, so that a page costs the same however many there are: one walk over what is public, one per
namespace of the viewer, one over the repositories that let the viewer in, merged. A search walks the index of words in the
order in which repositories changed (their rows in it are numbered so), and stops at the page's end as well.
"""

import heapq
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from corral.core.catalog import (
    DESCRIPTION_VERSION,
    CatalogEntry,
    CatalogPage,
    Description,
    Facts,
    Kind,
    LayerFacts,
    Order,
    Reach,
)
from corral.core.records import Capability
from corral.core.registry import StoredManifest, Visibility
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import (
    accounts,
    catalog_entries,
    collaborators,
    descriptions,
    manifests,
    repositories,
    tags,
)
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_NAMESPACE, Digest, parse_content_digest
from corral.wire.repositories import RepositoryName

#: A search by most pulled sorts this many of the newest that match.
_WINDOW = 500
#: Of each repository, for search.
_INDEXED_TAGS = 100
_MAX_WORDS = 8
_WORD = re.compile(r"[^\W_]+")

_KNOWN = frozenset(Capability)
#: SQLite's full-text index over `catalog_entries`; see migration 0003.
_search = sa.table("catalog_search", sa.column("rowid", sa.BigInteger))
_FACTS = (
    descriptions.c.kind,
    descriptions.c.size_bytes,
    descriptions.c.family,
    descriptions.c.parameter_size,
    descriptions.c.quantization,
    descriptions.c.context_length,
    descriptions.c.capabilities,
)
#: The tag that stands for its repository: `latest`, else the one that moved last.
_latest = sa.select(tags.c.manifest_digest).where(tags.c.repository_id == repositories.c.id, tags.c.tag_key == "latest")
_moved_last = (
    sa.select(tags.c.manifest_digest).where(tags.c.repository_id == repositories.c.id).order_by(tags.c.updated_at.desc()).limit(1)
)
_FACE = sa.func.coalesce(_latest.correlate(repositories).scalar_subquery(), _moved_last.correlate(repositories).scalar_subquery())
_ENTRY = (
    repositories.c.id,
    repositories.c.namespace,
    repositories.c.name,
    repositories.c.visibility,
    repositories.c.updated_at,
    repositories.c.pulls,
)


_is_alive = sa.or_(
    repositories.c.namespace_key == DEFAULT_NAMESPACE,
    repositories.c.namespace_key.contains(".", autoescape=True),
    repositories.c.mirrored_from != "",
    sa.exists().where(
        accounts.c.name_key == repositories.c.namespace_key, accounts.c.disabled_at.is_(None), accounts.c.deleted_at.is_(None)
    ),
)


class _Row(NamedTuple):
    """A repository in a listing. rank: what the listing is ordered by."""

    rank: int
    id: str
    namespace: str
    name: str
    visibility: str
    updated_at: datetime
    pulls: int


class _Texts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What of a description is read only on the page of its model."""

    template: str = ""
    system: str = ""
    license: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    layers: tuple[tuple[str, str, int], ...] = ()
    layer_count: int = 0
    note: str = ""


class SqlCatalog:
    """A CatalogStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def undescribed(self, *, limit: int) -> Sequence[StoredManifest]:
        """A walk of the index of versions, in which what is described is at the far end."""
        query = (
            sa.select(manifests.c.digest, manifests.c.media_type, manifests.c.body)
            .join(descriptions, descriptions.c.digest == manifests.c.digest)
            .where(descriptions.c.version < DESCRIPTION_VERSION)
            .order_by(descriptions.c.version, manifests.c.created_at.desc())
            .limit(limit)
        )
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [
            StoredManifest(digest=parse_content_digest(digest), media_type=media_type, body=body)
            for digest, media_type, body in rows
        ]

    async def describe(self, description: Description) -> None:
        """One durable transaction; the repositories that show it are indexed anew by the next refresh."""
        await self._database.write(partial(_describe, description=description))

    async def descriptions(self, digests: Sequence[Digest]) -> Mapping[Digest, Description]:
        """Looked up by primary key."""
        query = sa.select(descriptions.c.digest, descriptions.c.texts, *_FACTS).where(
            descriptions.c.digest.in_([str(digest) for digest in digests])
        )
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        found = (_description_of(digest, texts, facts) for digest, texts, *facts in rows)
        return {description.digest: description for description in found}

    async def refresh(self, *, limit: int) -> int:
        """Relaxed: what a power cut takes back is stale again as well."""
        return await self._database.write_relaxed(partial(_refresh, limit=limit))

    async def add_pulls(self, counts: Mapping[RepositoryName, int]) -> None:
        """Relaxed: a count may be lost in a power cut."""
        namespace, name = sa.bindparam("in_namespace", type_=sa.Text), sa.bindparam("named", type_=sa.Text)
        query = (
            sa.update(repositories)
            .where(repositories.c.namespace_key == namespace, repositories.c.name_key == name)
            .values(pulls=repositories.c.pulls + sa.bindparam("more", type_=sa.BigInteger))
        )
        rows = [
            {"in_namespace": pulled.key.namespace, "named": pulled.key.name, "more": count} for pulled, count in counts.items()
        ]
        if rows:
            await self._database.write_relaxed(lambda connection: connection.execute(query, rows))

    async def pulls(self, repository_id: str) -> int:
        """One inline read."""
        row = self._database.row("SELECT pulls FROM repositories WHERE id = ?", repository_id)
        return int(row[0]) if row else 0

    async def page(
        self,
        reach: Reach,
        *,
        order: Order,
        limit: int,
        words: Sequence[str] = (),
        namespace: str = "",
        after: str = "",
    ) -> CatalogPage:
        """One consistent snapshot for the rows and their facts."""
        if words and not match_of(words):
            return CatalogPage(entries=())
        asked = _Asked(
            reach=reach,
            order=order,
            limit=limit,
            match=match_of(words),
            namespace=namespace.lower(),
            cursor=_parse_cursor(after),
        )
        return await self._database.read(partial(_page, asked=asked))


# ── Descriptions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _describe(connection: sa.Connection, *, description: Description) -> None:
    digest, facts = str(description.digest), description.facts
    texts = _Texts(
        template=description.template,
        system=description.system,
        license=description.license,
        parameters=description.parameters,
        layers=tuple((layer.kind, str(layer.digest), layer.size_bytes) for layer in description.layers),
        layer_count=description.layer_count,
        note=description.note,
    )
    row = {
        "version": DESCRIPTION_VERSION,
        "kind": facts.kind.value,
        "size_bytes": facts.size_bytes,
        "family": facts.family,
        "parameter_size": facts.parameter_size,
        "quantization": facts.quantization,
        "context_length": facts.context_length,
        "capabilities": " ".join(sorted(facts.capabilities)),
        "texts": msgspec.json.encode(texts).decode(),
    }
    connection.execute(sa.update(descriptions).where(descriptions.c.digest == digest).values(row))
    shown_by = sa.select(tags.c.repository_id).where(tags.c.manifest_digest == digest)
    connection.execute(sa.update(catalog_entries).where(catalog_entries.c.repository_id.in_(shown_by)).values(is_stale=True))


def _facts_of(row: Sequence[Any]) -> Facts:
    kind, size_bytes, family, parameter_size, quantization, context_length, capabilities = row
    return Facts(
        kind=Kind(kind),
        size_bytes=size_bytes,
        family=family,
        parameter_size=parameter_size,
        quantization=quantization,
        context_length=context_length,
        capabilities=frozenset(Capability(name) for name in capabilities.split() if name in _KNOWN),
    )


def _description_of(digest: str, texts: str, facts: Sequence[Any]) -> Description:
    told = msgspec.json.decode(texts, type=_Texts)
    return Description(
        digest=parse_content_digest(digest),
        facts=_facts_of(facts),
        template=told.template,
        system=told.system,
        license=told.license,
        parameters=told.parameters,
        layers=tuple(LayerFacts(kind, parse_content_digest(layer), size) for kind, layer, size in told.layers),
        layer_count=told.layer_count,
        note=told.note,
    )


# ── The search index ─────────────────────────────────────────────────────────────────────────────────────────────────


def _refresh(connection: sa.Connection, *, limit: int) -> int:
    stale = (
        sa.select(catalog_entries.c.repository_id, catalog_entries.c.scope, catalog_entries.c.words)
        .where(catalog_entries.c.is_stale.is_(True))
        .order_by(catalog_entries.c.id)
        .limit(limit)
    )
    rows = connection.execute(stale).all()
    for repository_id, scope, words in rows:
        own = catalog_entries.c.repository_id == repository_id
        now = _words_of(connection, repository_id)
        if now == words:
            connection.execute(sa.update(catalog_entries).where(own).values(is_stale=False))
            continue
        # A new row with the highest number: the index is in the order of change, newest last.
        connection.execute(sa.delete(catalog_entries).where(own))
        entry = {"repository_id": repository_id, "scope": scope, "words": now, "is_stale": False}
        connection.execute(sa.insert(catalog_entries).values(entry))
    return len(rows)


def _words_of(connection: sa.Connection, repository_id: str) -> str:
    """What a repository is found by: its names, its tags, and the facts of their models."""
    named = sa.select(repositories.c.namespace, repositories.c.name).where(repositories.c.id == repository_id)
    tagged = (
        sa.select(
            tags.c.tag,
            descriptions.c.family,
            descriptions.c.parameter_size,
            descriptions.c.quantization,
            descriptions.c.capabilities,
        )
        .outerjoin(descriptions, descriptions.c.digest == tags.c.manifest_digest)
        .where(tags.c.repository_id == repository_id)
        .order_by(tags.c.updated_at.desc(), tags.c.tag_key)
        .limit(_INDEXED_TAGS)
    )
    texts = [*connection.execute(named).one(), *itertools.chain.from_iterable(connection.execute(tagged))]
    return " ".join(dict.fromkeys(word for text in texts if text for word in text.split()))


def match_of(words: Iterable[str]) -> str:
    """The words as the index understands them: each must begin a word of the entry. Empty when there is none among them. What is
    no letter or digit parts words here as it does there, so that nothing of the index's own language can be said."""
    pieces = [piece for word in words for piece in _WORD.findall(word)]
    return " AND ".join(f'"{piece}"*' for piece in pieces[:_MAX_WORDS])


# ── Listings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A piece of a listing, as it was asked for. match: of the search, empty for a listing. namespace: lower case, or empty.
    cursor: rank and id of the last row that was shown."""

    reach: Reach
    order: Order
    limit: int
    match: str
    namespace: str
    cursor: tuple[int, str] | None

    @property
    def own(self) -> Sequence[str]:
        """The namespaces whose private repositories are shown."""
        asked = {self.namespace} if self.namespace else self.reach.namespaces
        return sorted(asked & self.reach.namespaces)


def _parse_cursor(after: str) -> tuple[int, str] | None:
    if not after:
        return None
    rank, _, repository_id = after.partition(".")
    if not re.fullmatch(r"[0-9]{1,18}", rank) or not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", repository_id):
        raise CorralError("bad_request", "there is no such piece of the list; start from its beginning")
    return int(rank), repository_id


def _page(connection: sa.Connection, *, asked: _Asked) -> CatalogPage:
    rows = _find(connection, asked) if asked.match else _walk(connection, asked)
    shown = rows[: asked.limit]
    facts = _faces(connection, [row.id for row in shown])
    entries = tuple(
        CatalogEntry(
            repository_id=row.id,
            namespace=row.namespace,
            name=row.name,
            visibility=Visibility(row.visibility),
            updated_at=row.updated_at,
            pulls=row.pulls,
            facts=facts.get(row.id),
        )
        for row in shown
    )
    after = f"{shown[-1].rank}.{shown[-1].id}" if len(rows) > asked.limit else ""
    return CatalogPage(entries=entries, after=after)


def _faces(connection: sa.Connection, repository_ids: Sequence[str]) -> dict[str, Facts]:
    """Repository -> the facts of the tag that stands for it."""
    faces = sa.select(repositories.c.id, _FACE.label("digest")).where(repositories.c.id.in_(repository_ids)).subquery()
    query = sa.select(faces.c.id, *_FACTS).join(descriptions, descriptions.c.digest == faces.c.digest)
    return {row[0]: _facts_of(row[1:]) for row in connection.execute(query)}


def _walk(connection: sa.Connection, asked: _Asked) -> list[_Row]:
    """The first rows of every branch, merged. No repository is in two of them."""
    rank = sa.type_coerce(repositories.c.updated_at, sa.BigInteger) if asked.order is Order.NEWEST else repositories.c.pulls
    query = sa.select(rank, *_ENTRY).order_by(rank.desc(), repositories.c.id.desc()).limit(asked.limit + 1)
    if asked.cursor is not None:
        query = query.where(sa.tuple_(rank, repositories.c.id) < sa.tuple_(*map(sa.literal, asked.cursor)))
    branches = [query.where(_is_public(asked.namespace))]
    branches += [query.where(_is_private_in(namespace)) for namespace in asked.own]
    if let_in := _let_in(connection, asked):
        branches.append(query.where(repositories.c.id.in_(let_in)))
    return _merged(connection, branches, asked.limit + 1)


def _find(connection: sa.Connection, asked: _Asked) -> list[_Row]:
    """The same for a search. The index is asked for what the viewer may see, so that hardly any of its rows is thrown away."""
    is_newest = asked.order is Order.NEWEST
    rank = _search.c.rowid if is_newest else repositories.c.pulls
    query = (
        sa.select(rank, *_ENTRY)
        .select_from(_search)
        .join(catalog_entries, catalog_entries.c.id == _search.c.rowid)
        .join(repositories, repositories.c.id == catalog_entries.c.repository_id)
        .order_by(_search.c.rowid.desc())
        .limit(asked.limit + 1 if is_newest else _WINDOW)
    )
    if is_newest and asked.cursor is not None:
        query = query.where(_search.c.rowid < asked.cursor[0])
    may_see = sa.or_(_is_public(""), *map(_is_private_in, asked.own))
    branches = [query.where(_matches(_scoped(asked)), may_see)]
    if let_in := _let_in(connection, asked):
        # By number, one by one: asked the other way round, the index would walk all that match.
        rows = sa.select(catalog_entries.c.id).where(catalog_entries.c.repository_id.in_(let_in))
        numbers = connection.execute(rows).scalars().all()
        branches.append(query.where(_matches(f"words : ({asked.match})"), _search.c.rowid.in_(numbers)))
    if is_newest:
        return _merged(connection, branches, asked.limit + 1)
    found = sorted(_merged(connection, branches, _WINDOW), key=_by_rank, reverse=True)
    behind = (row for row in found if asked.cursor is None or _by_rank(row) < asked.cursor)
    return list(itertools.islice(behind, asked.limit + 1))


def _let_in(connection: sa.Connection, asked: _Asked) -> Sequence[str]:
    """Private repositories of others that are open to this account: few, so they are looked at one by one."""
    open_to = sa.select(collaborators.c.repository_id).where(collaborators.c.account_id == asked.reach.account_id)
    repository_ids = connection.execute(open_to).scalars().all() if asked.reach.account_id else ()
    if not repository_ids:
        return ()
    query = sa.select(repositories.c.id).where(
        repositories.c.id.in_(repository_ids),
        repositories.c.namespace_key.not_in(asked.own),
        repositories.c.visibility == Visibility.PRIVATE.value,
        _is_alive,
    )
    if asked.namespace:
        query = query.where(repositories.c.namespace_key == asked.namespace)
    return connection.execute(query).scalars().all()


def _is_public(namespace: str) -> sa.ColumnElement[bool]:
    """Public, of a namespace that somebody answers for: what a disabled or deleted account had is gone for everybody (T119)."""
    found = (repositories.c.visibility == Visibility.PUBLIC.value) & _is_alive
    return found & (repositories.c.namespace_key == namespace) if namespace else found


def _is_private_in(namespace: str) -> sa.ColumnElement[bool]:
    return (repositories.c.namespace_key == namespace) & (repositories.c.visibility == Visibility.PRIVATE.value)


def _scoped(asked: _Asked) -> str:
    """The search, narrowed to what is public or the viewer's own, in the index's own language."""
    own = [_scope_word(namespace) for namespace in asked.own]
    scope = f"scope : ({' OR '.join(['public', *own])})"
    if asked.namespace:
        scope = f"{scope} AND scope : {_scope_word(asked.namespace)}"
    return f"{scope} AND words : ({asked.match})"


def _scope_word(namespace: str) -> str:
    """A namespace as one word of the index; the trigger that writes it makes the same."""
    return "n" + namespace.encode().hex()


def _matches(match: str) -> sa.ColumnElement[bool]:
    return sa.literal_column(_search.name).op("MATCH")(match)


def _by_rank(row: _Row) -> tuple[int, str]:
    return row.rank, row.id


def _merged(connection: sa.Connection, branches: Sequence[sa.Select[Any]], limit: int) -> list[_Row]:
    """The first rows of several sorted queries, none of which shares a repository with another."""
    lists = [[_Row._make(row) for row in connection.execute(branch)] for branch in branches]
    return list(itertools.islice(heapq.merge(*lists, key=_by_rank, reverse=True), limit))
