"""What tenants may not decide about runners."""

from corral.hub.pools import SharedRunners, UpstreamRunners
from corral.wire.options import merge_options
from fakes_inference import FakePool, FakeUpstreams, a_model


async def test_shared_runners_load_as_the_model_says_and_not_as_the_caller_says() -> None:
    pool = FakePool()
    model = a_model(parameters={"num_ctx": 2048, "temperature": 1})
    async with SharedRunners(pool).use(
        model, options=merge_options({}, {"num_ctx": 1, "num_thread": 99}), keep_alive_s=-1, embedding=True
    ):
        assert pool.lent == 1
    assert pool.used == [{"model": model, "options": None, "keep_alive_s": None, "embedding": True}]
    assert pool.lent == 0


async def test_shared_runners_are_not_unloaded_by_a_caller() -> None:
    pool = FakePool()
    await SharedRunners(pool).unload(a_model())
    assert pool.unloaded == []


async def test_upstream_runner_is_for_one_request() -> None:
    upstreams = FakeUpstreams()
    pool = UpstreamRunners(upstreams)
    stub = a_model(weights=None, remote_host="http://u", remote_model="x")
    async with pool.use(stub, options=merge_options({}, {"num_ctx": 1})) as slot:
        assert (slot.load_ns, slot.context_length) == (0, 0)
        assert not upstreams.runner.is_closed
    await pool.unload(stub)
    assert upstreams.loaded == [stub]
    assert upstreams.runner.is_closed
