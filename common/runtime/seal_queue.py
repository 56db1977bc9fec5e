"""Blocks that are to be sealed, one batch after the other in a thread of its own: checksums are memory-bound, and READY messages
must not overtake each other."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from common.mesh.worker_effects import SealBlocks
from common.ports.kv_transport import KvRegion
from common.protocol.messages import ReadyBlock
from common.runtime.failpoints import Failpoints


class SealQueue:
    """`on_sealed` takes what came out, on the event loop. Bounded by the pool: a block waits for one seal at a time."""

    def __init__(self, region: KvRegion, failpoints: Failpoints, on_sealed: Callable[[SealBlocks, list[ReadyBlock]], None]) -> None:
        self._region = region
        self._failpoints = failpoints
        self._on_sealed = on_sealed
        self._waiting: asyncio.Queue[SealBlocks] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal")

    def put(self, effect: SealBlocks) -> None:
        self._waiting.put_nowait(effect)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            effect = await self._waiting.get()
            blocks = await loop.run_in_executor(self._thread, self._seal, effect)
            self._failpoints.sealed(self._region, effect.blocks)
            self._on_sealed(effect, blocks)
            self._failpoints.hit("prefill.chunk_sealed")

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _seal(self, effect: SealBlocks) -> list[ReadyBlock]:
        return [
            ReadyBlock(
                index=filled.index,
                block=filled.block,
                generation=filled.generation,
                checksum=self._region.seal(filled.block, valid_positions=filled.valid),
            )
            for filled in effect.blocks
        ]
