"""What is told of quotas; what they hold back is in test_uploads.py."""

import pytest

from corral.core.registry import Right
from corral.hub.quotas import StorageUse
from corral.wire.errors import CorralError
from corral.wire.repositories import RepositoryName
from registry_hub import RegistryHub

TINY = RepositoryName("alice", "tiny")


async def test_use_is_told_against_the_account_s_own_quota_else_the_default() -> None:
    hub = RegistryHub(quota_bytes=100)
    alice = await hub.add("alice")
    await hub.push_blob(TINY, alice, b"12345")
    assert await hub.quotas.use_of("Alice") == StorageUse(stored_bytes=5, quota_bytes=100)
    await hub.accounts.set_quota(alice.account.id, 7)
    assert await hub.quotas.use_of("alice") == StorageUse(stored_bytes=5, quota_bytes=7)


async def test_use_counts_uploads_that_are_under_way() -> None:
    hub = RegistryHub()
    alice = await hub.add("alice")
    await hub.repositories.find(TINY, Right.PUSH, alice)
    upload = await hub.start(TINY, alice)
    await hub.store.advance_upload(upload.id, offset_bytes=9, now=hub.clock.now())
    assert await hub.quotas.use_of("alice") == StorageUse(stored_bytes=9, quota_bytes=None)


async def test_namespace_of_the_hub_has_no_quota() -> None:
    hub = RegistryHub(quota_bytes=100)
    assert await hub.quotas.use_of("library") == StorageUse(stored_bytes=0, quota_bytes=None)


async def test_use_of_a_repository_is_told_against_its_own_quota() -> None:
    hub = RegistryHub(quota_bytes=100)
    alice = await hub.add("alice")
    await hub.push_blob(TINY, alice, b"12345")
    assert await hub.quotas.use_of_repository(TINY) == ("alice/tiny", StorageUse(stored_bytes=5, quota_bytes=None))
    await hub.repositories.set_quota(TINY, 7)
    assert await hub.quotas.use_of_repository(TINY) == ("alice/tiny", StorageUse(stored_bytes=5, quota_bytes=7))
    with pytest.raises(CorralError, match="repository unknown"):
        await hub.quotas.use_of_repository(RepositoryName("alice", "other"))
