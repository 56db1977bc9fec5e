"""Laws of the whole mesh that need no real model: models side by side, clients that leave, prompts shared, workers lost."""

import asyncio

import pytest

from common.engine.synthetic import StepTimes
from common.ports.generation import Generation, TokenEvent
from common.values.errors import ContextTooLong, InvalidRequest, ModelNotFound, NeverFits, RequestFailed, Unavailable
from tests.mesh_in_memory import card, collect, request, running_mesh, tokens

SLOW = StepTimes(fixed=0.02)


async def test_two_models_form_two_groups() -> None:
    async with running_mesh() as mesh:
        gateway = await mesh.start_gateway()
        for name in ("one", "two"):
            await mesh.start_worker(f"p-{name}", "prefill", model=card(name))
            await mesh.start_worker(f"d-{name}", "decode", model=card(name))
        async with asyncio.timeout(10):
            while {c.model.name for c in gateway.cards()} != {"one", "two"}:
                await asyncio.sleep(0.02)
            while not all(w.service.tiers for w in mesh.workers.values()):
                await asyncio.sleep(0.02)
        for name in ("one", "two"):
            assert mesh.workers[f"p-{name}"].service.tiers == {f"d-{name}": "memory"}
            assert len(tokens((await collect(gateway, request([5, 6, 7], model=name)))[0])) == 8
        assert mesh.workers["d-one"].service.core.counters.tokens > 0
        with pytest.raises(ModelNotFound, match="one, two"):
            await gateway.start(request([5], model="three"))
        await mesh.quiet()


async def test_the_second_identical_prompt_moves_at_most_one_block() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill")
        decode = await mesh.start_worker("d0", "decode")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        copied = decode.service.core.desk.counters.blocks
        await collect(gateway, request(range(3, 45)))
        first = copied["copied"]
        await collect(gateway, request(range(3, 45)))
        assert first == 11
        assert copied["copied"] - first <= 1
        await mesh.quiet()


async def test_choices_share_one_prefill_and_one_transfer() -> None:
    async with running_mesh() as mesh:
        prefill = await mesh.start_worker("p0", "prefill")
        decode = await mesh.start_worker("d0", "decode")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        events = await collect(gateway, request(range(3, 45), choices=4))
        assert all(len(tokens(events[choice])) == 8 for choice in range(4))
        assert decode.service.core.desk.counters.blocks["copied"] <= 11 + 3
        assert prefill.service.core.load().computed_tokens <= 42 + 3 * 4
        await mesh.quiet()


async def test_a_client_that_leaves_frees_everything() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill", times=SLOW)
        decode = await mesh.start_worker("d0", "decode", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        generation = await gateway.start(request(range(3, 20), max_tokens=200))
        seen = 0
        while seen < 5:
            seen += len(await generation.next_events())
        await generation.close()
        assert gateway.core.active == 0
        async with asyncio.timeout(1):
            while not all(worker.service.core.idle for worker in mesh.workers.values()):
                await asyncio.sleep(0.01)
        assert decode.service.core.counters.ended["cancelled"] == 1
        await mesh.quiet()


async def test_one_choice_can_be_ended_while_the_others_go_on() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("b0", "both", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        generation = await gateway.start(request(range(3, 9), max_tokens=20, choices=2))
        counts = {0: 0, 1: 0}
        while events := await generation.next_events():
            for event in events:
                counts[event.choice] += 1
            if counts[1] >= 3:
                generation.cancel(1)
        assert counts[0] == 20
        assert 3 <= counts[1] < 20
        await generation.close()
        await mesh.quiet()


async def test_a_slow_reader_delays_nobody() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("b0", "both")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        unread = await gateway.start(request(range(3, 9), max_tokens=200))
        assert len(tokens((await collect(gateway, request(range(3, 12), max_tokens=200)))[0])) == 200
        assert len(tokens(await read_to_the_end(unread))) == 200
        await unread.close()


async def test_a_lost_worker_is_replaced_within_the_stream() -> None:
    wanted = request(range(3, 30), max_tokens=60)
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill", times=SLOW)
        await mesh.start_worker("d0", "decode", times=SLOW)
        await mesh.start_worker("d1", "decode", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        generation = await gateway.start(wanted)
        events = []
        stopped = False
        while batch := await generation.next_events():
            events.extend(batch)
            if len(events) >= 5 and not stopped:
                stopped = True
                busy = next(w for n, w in mesh.workers.items() if n[0] == "d" and not w.service.core.idle)
                await busy.crash()
        await generation.close()
        assert len(tokens(events)) == 60
        assert [e.index for e in events] == list(range(60))
        assert tokens(events) == tokens((await collect(gateway, request(wanted.prompt, max_tokens=60)))[0])
        await mesh.quiet()


async def test_what_can_never_be_served_is_refused_before_it_starts() -> None:
    async with running_mesh() as mesh:
        gateway = await mesh.start_gateway()
        with pytest.raises(Unavailable, match="no worker is ready"):
            await gateway.start(request([5]))
        await mesh.start_worker("b0", "both", blocks=8)
        await mesh.settled(gateway)
        with pytest.raises(ContextTooLong, match="300 tokens"):
            await gateway.start(request([5] * 300))
        with pytest.raises(NeverFits, match="KV cache"):
            await gateway.start(request([5] * 40))
        with pytest.raises(InvalidRequest, match="token ids"):
            await gateway.start(request([5_000]))
        mesh.store.set_available(False)
        with pytest.raises(Unavailable):
            await gateway.start(request([5]))
        mesh.store.set_available(True)
        assert len(tokens((await collect(gateway, request([5])))[0])) == 8
        await mesh.quiet()


async def read_to_the_end(generation: Generation) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while batch := await generation.next_events():
        events.extend(batch)
    return events


async def test_a_request_that_nobody_can_run_to_its_end_fails_with_one_error() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("b0", "both", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        wanted = request(range(3, 9), max_tokens=100)
        late = type(wanted)(request_id=wanted.request_id, model="tiny", prompt=wanted.prompt, sampling=wanted.sampling, deadline_s=0.5)
        generation = await gateway.start(late)
        with pytest.raises(RequestFailed, match="deadline"):
            await read_to_the_end(generation)
        await generation.close()
        await mesh.quiet()


async def test_a_prompt_larger_than_the_broker_takes_goes_through_the_request_record() -> None:
    prompt = [3 + i % 900 for i in range(400_000)]
    async with running_mesh() as mesh:
        big = card(max_model_len=420_000)
        await mesh.start_worker("p0", "prefill", blocks=101_000, max_tokens=16_384, model=big)
        await mesh.start_worker("d0", "decode", blocks=101_000, max_tokens=16_384, model=big)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        events = await collect(gateway, request(prompt, max_tokens=3))
        assert len(tokens(events[0])) == 3
        assert mesh.workers["d0"].service.core.counters.tokens == 2
        await mesh.quiet()
