"""What workers emit is found in the store's token log: gapless, with log-probabilities, whatever became of the store meanwhile."""

import asyncio

from common.engine.synthetic import StepTimes
from common.protocol.stored_log import StoredChoice, assemble, decode_entry
from common.values.ids import RequestId
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh, tokens


async def stored(mesh: MeshInMemory, request_id: RequestId) -> dict[int, StoredChoice]:
    return assemble(decode_entry(entry) for entry in await mesh.store.read_list(mesh.names.log_key(request_id)))


async def whole_log(mesh: MeshInMemory, request_id: RequestId, choices: int = 1) -> dict[int, StoredChoice]:
    """Wait until the ends of all choices are there."""
    async with asyncio.timeout(10):
        while True:
            found = await stored(mesh, request_id)
            if len(found) == choices and all(choice.ending is not None for choice in found.values()):
                return found
            await asyncio.sleep(0.02)


async def test_the_log_holds_every_token_of_every_choice_across_a_hand_off() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill")
        await mesh.start_worker("d0", "decode")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        wanted = request(range(3, 45), choices=3, logprobs=2)
        events = await collect(gateway, wanted)
        found = await whole_log(mesh, wanted.request_id, 3)
        for choice, stored_choice in found.items():
            assert stored_choice.tokens == tokens(events[choice])
            assert stored_choice.logprobs == [event.logprobs for event in events[choice] if event.token is not None]
            assert stored_choice.ending == events[choice][-1].ending


async def test_the_log_goes_on_after_the_death_of_a_worker() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill")
        workers = [await mesh.start_worker(name, "decode", times=StepTimes(fixed=0.03)) for name in ("d0", "d1")]
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        wanted = request([5, 6, 7], max_tokens=20)
        reading = asyncio.create_task(collect(gateway, wanted))
        async with asyncio.timeout(10):
            while not (busy := [w for w in workers if w.service.core.counters.tokens > 6]):
                await asyncio.sleep(0.01)
        await busy[0].crash()
        events = await reading
        found = await whole_log(mesh, wanted.request_id)
        assert found[0].attempt > 1
        assert found[0].tokens == tokens(events[0])


async def test_a_store_that_was_away_or_lost_everything_gets_the_whole_log_again() -> None:
    async with running_mesh() as mesh:
        worker = await mesh.start_worker("w0", "both", times=StepTimes(fixed=0.03))
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        wanted = request([5, 6, 7], max_tokens=120)
        reading = asyncio.create_task(collect(gateway, wanted))
        log = worker.service.token_log
        async with asyncio.timeout(20):
            while log.counts["entries"] < 2:
                await asyncio.sleep(0.01)
            mesh.store.set_available(False)
            while not log.counts["errors"]:
                await asyncio.sleep(0.01)
            mesh.store.set_available(True)
            seen = log.counts["entries"]
            while log.counts["entries"] < seen + 2:
                await asyncio.sleep(0.01)
            await mesh.store.delete(mesh.names.log_key(wanted.request_id))
            events = await reading
        assert (await whole_log(mesh, wanted.request_id))[0].tokens == tokens(events[0])
        assert log.counts["restarts"] == 1
