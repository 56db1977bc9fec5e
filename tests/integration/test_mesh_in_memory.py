"""The whole mesh in one process: real cores and shells, in-memory brokers and transport, the synthetic engine."""

import asyncio
import random

import pytest

from common.runtime.one_error import one_error
from common.values.errors import TransportBroken
from tests.mesh_in_memory import collect, request, running_mesh, tokens


async def reference(wanted):
    """What a colocated worker makes of a request."""
    async with running_mesh() as mesh:
        await mesh.start_worker("alone", "both")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        return {choice: tokens(events) for choice, events in (await collect(gateway, wanted)).items()}


async def test_a_prompt_is_prefilled_on_one_worker_and_decoded_on_another():
    wanted = request(range(3, 40), max_tokens=12)
    expected = await reference(wanted)
    async with running_mesh() as mesh:
        p = await mesh.start_worker("p0", "prefill")
        d = await mesh.start_worker("d0", "decode")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        events = await collect(gateway, wanted)
        assert {choice: tokens(e) for choice, e in events.items()} == expected
        assert events[0][-1].ending is not None
        assert events[0][-1].ending.reason == "length"
        await mesh.quiet()
        assert p.service.core.counters.tokens == 1
        assert d.service.core.counters.tokens == 11
        assert p.service.core.desk.counters.settled["moved"] == 1


async def test_many_requests_at_once_with_small_pools():
    rng = random.Random(7)
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill", blocks=48, max_num_seqs=6)
        await mesh.start_worker("p1", "prefill", blocks=48, max_num_seqs=6)
        await mesh.start_worker("d0", "decode", blocks=40, max_num_seqs=5)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        wanted = [
            request(
                [rng.randrange(3, 50) for _ in range(rng.randrange(1, 60))],
                max_tokens=rng.randrange(1, 30),
                choices=rng.choice((1, 1, 2, 3)),
            )
            for _ in range(60)
        ]
        results = await asyncio.gather(*(collect(gateway, w) for w in wanted))
        for w, events in zip(wanted, results, strict=True):
            for choice in range(w.choices):
                assert len(tokens(events[choice])) == w.sampling.max_tokens, (w, events[choice][-1])
                assert events[choice][-1].ending.reason == "length"
        await mesh.quiet()
        await asyncio.sleep(1.2)
        await mesh.quiet()
        prints = {n: (w.service.core.desk.counters, w.service.core.load()) for n, w in mesh.workers.items()}
        print(prints)


async def test_a_worker_that_can_move_kv_no_more_ends_with_one_error_that_says_so():
    async def breaks_down():
        async with running_mesh() as mesh:
            worker = await mesh.start_worker("d0", "decode")
            await worker.ready.wait()
            worker.transport.break_down("its thread ended")
            await asyncio.wait([worker.task])

    with pytest.raises(TransportBroken, match="its thread ended"), one_error(TransportBroken):
        await breaks_down()
