"""All workers of a model compute in one dtype, whoever asks first and whatever happens to the store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from common.runtime.dtype_agreement import DTYPE_FIELD, DTYPE_TTL_S, DtypeAgreement
from common.values.errors import ModelError, StoreUnavailable
from common.values.kv_layout import KvDtype
from tests.contract.store_worlds import MemoryStoreWorld, StoreWorld, store_world

KEY = "segue:v1:test:dtype:model:1"


@pytest.fixture(params=["memory", pytest.param("valkey", marks=pytest.mark.servers)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[StoreWorld]:
    async with store_world(request.param) as world:
        yield world


def measuring(dtype: KvDtype, *, calls: list[str]) -> Callable[[], Awaitable[KvDtype]]:
    async def measure() -> KvDtype:
        calls.append(dtype)
        await asyncio.sleep(0)
        return dtype

    return measure


async def test_the_first_fixes_it_and_later_ones_do_not_even_measure(world: StoreWorld) -> None:
    calls: list[str] = []
    assert await DtypeAgreement(world.first, KEY).settle(measuring("bfloat16", calls=calls)) == "bfloat16"
    assert await DtypeAgreement(world.second, KEY).settle(measuring("float32", calls=calls)) == "bfloat16"
    assert calls == ["bfloat16"]


async def test_two_that_start_together_agree(world: StoreWorld) -> None:
    one, other = DtypeAgreement(world.first, KEY), DtypeAgreement(world.second, KEY)
    dtypes = await asyncio.gather(one.settle(measuring("float32", calls=[])), other.settle(measuring("bfloat16", calls=[])))
    assert len(set(dtypes)) == 1
    assert await one.fixed() == dtypes[0]


async def test_whoever_was_told_another_dtype_changes_nothing(world: StoreWorld) -> None:
    await DtypeAgreement(world.first, KEY).hold("bfloat16")
    told = DtypeAgreement(world.second, KEY)
    assert await told.hold("float32") == "bfloat16"
    assert await told.fixed() == "bfloat16"


async def test_living_workers_write_it_again_after_an_empty_restart(world: StoreWorld) -> None:
    agreement = DtypeAgreement(world.first, KEY)
    await agreement.hold("bfloat16")
    await world.first.delete(KEY)
    assert await agreement.fixed() is None
    assert await agreement.hold("bfloat16") == "bfloat16"
    assert await DtypeAgreement(world.second, KEY).fixed() == "bfloat16"


async def test_a_dtype_that_this_version_does_not_know_is_named(world: StoreWorld) -> None:
    await world.first.create(KEY, {DTYPE_FIELD: b"float4"}, ttl_s=10)
    with pytest.raises(ModelError, match="float4"):
        await DtypeAgreement(world.second, KEY).fixed()


async def test_it_lives_as_long_as_somebody_renews_it() -> None:
    world = MemoryStoreWorld()
    agreement = DtypeAgreement(world.first, KEY)
    await agreement.hold("bfloat16")
    for _ in range(3):
        await world.let_pass(0.7 * DTYPE_TTL_S)
        assert await agreement.hold("bfloat16") == "bfloat16"
    await world.let_pass(1.1 * DTYPE_TTL_S)
    assert await DtypeAgreement(world.second, KEY).hold("float32") == "float32"


async def test_a_store_that_is_away_ends_no_worker() -> None:
    world = MemoryStoreWorld()
    agreement = DtypeAgreement(world.first, KEY)
    await world.stop()
    with pytest.raises(StoreUnavailable):
        await agreement.hold("bfloat16")
    keeping = asyncio.create_task(agreement.keep("bfloat16"))
    await asyncio.sleep(0.01)
    assert not keeping.done()
    keeping.cancel()
