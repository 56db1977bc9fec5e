"""Pulling KV blocks, with the time that it takes: the source changes hands, dies or freezes meanwhile, and bytes are spoilt.

On the mapped tier the receiver copies by itself, half a block now and half later, also after the peer's death. On the
message tier the peer serves what was granted, and a pull that gets no answer is given up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from common.mesh.worker_effects import PullBlocks
from common.simulation.shadow_kv import ShadowKv
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.surroundings import Surroundings
from common.values.errors import InvariantBroken
from common.values.ids import ReservationId
from common.values.transfer import BlockSource, PullOutcome

STALL_TIMEOUT_S = 10.0


class CopySource(Protocol):
    """The peer, as far as a pull needs it. `kv` is the pool of its present life."""

    @property
    def process(self) -> SimulatedProcess: ...
    @property
    def kv(self) -> ShadowKv: ...
    @property
    def grants(self) -> dict[ReservationId, dict[int, int]]: ...


Done = Callable[[list[PullOutcome]], None]


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedPull:
    """One pull of `process` in one `life`. `source_kv` is the region as it was when the two were connected."""

    around: Surroundings
    process: SimulatedProcess
    effect: PullBlocks
    kv: ShadowKv
    source: CopySource
    source_kv: ShadowKv
    mapped: bool
    done: Done
    life: int
    over: bool = False

    def start(self) -> None:
        if self.mapped:
            self._start_mapped()
        else:
            self._start_messages()

    def _start_mapped(self) -> None:
        fenced = [self.fence_holds(block) for block in self.effect.blocks]
        self._later(partial(self._copy_half, fenced))

    def _start_messages(self) -> None:
        self.process.after(STALL_TIMEOUT_S, "copy timer", self.give_up)
        if self.source.process.up and self.source.kv is self.source_kv:
            self.source.process.after(self.around.takes(self.around.strength.copy_s), "copy", self._serve)
        else:
            self.process.after(self.around.takes(0.01), "copy", self.give_up)

    def give_up(self) -> None:
        """The peer is lost: nothing of it will arrive any more."""
        self._finish(["lost"] * len(self.effect.blocks))

    def fence_holds(self, block: BlockSource) -> bool:
        return self.source_kv.generations[block.source_block] == block.generation

    def sum_holds(self, block: BlockSource) -> bool:
        return self.kv.checksum(block.landing_block) == block.checksum

    # ------------------------------------------------------------------ private

    def _copy_half(self, fenced: list[bool]) -> None:
        half = self.kv.block_size // 2
        for block in self.effect.blocks:
            self.kv.copy_slots(self.source_kv, block.source_block, block.landing_block, slice(0, half))
        self._later(partial(self._copy_rest, fenced))

    def _copy_rest(self, fenced: list[bool]) -> None:
        half = self.kv.block_size // 2
        for block in self.effect.blocks:
            self.kv.copy_slots(self.source_kv, block.source_block, block.landing_block, slice(half, None))
        self._later(partial(self._check, fenced))

    def _check(self, fenced: list[bool]) -> None:
        outcomes = []
        for block, held in zip(self.effect.blocks, fenced, strict=True):
            self._maybe_spoil(block)
            outcomes.append(self._outcome(block, held=held and self.fence_holds(block)))
        self._finish(outcomes)

    def _serve(self) -> None:
        """In the peer's process: its own blocks, as they are now."""
        granted = self.source.grants.get(self.effect.reservation, {})
        content = []
        for block in self.effect.blocks:
            allowed = granted.get(block.source_block) == block.generation
            fits = self.fence_holds(block)
            content.append((allowed, fits, self.source_kv.content(block.source_block)))
        self._later(partial(self._land, content))

    def _land(self, content: list[tuple[bool, bool, list[int | None]]]) -> None:
        if self.over or self.life != self.process.life:
            return
        outcomes: list[PullOutcome] = []
        for block, (allowed, fits, slots) in zip(self.effect.blocks, content, strict=True):
            if not allowed:
                outcomes.append("refused")
                continue
            self.kv.write_block(block.landing_block, slots)
            self._maybe_spoil(block)
            outcomes.append(self._outcome(block, held=fits))
        self._finish(outcomes)

    def _maybe_spoil(self, block: BlockSource) -> None:
        if self.around.random.random() < self.around.strength.corruption:
            self.kv.spoil(block.landing_block)

    def _outcome(self, block: BlockSource, *, held: bool) -> PullOutcome:
        if not held:
            return "generation"
        return "copied" if self.sum_holds(block) else "checksum"

    def _later(self, action: Callable[[], None]) -> None:
        seconds = self.around.takes(self.around.strength.copy_s * len(self.effect.blocks) / 3)
        self.process.after(seconds, f"copy {self.effect.ticket}", action)

    def _finish(self, outcomes: list[PullOutcome]) -> None:
        if self.over or self.life != self.process.life:
            return
        self.over = True
        self.around.counts.update(f"block_{outcome}" for outcome in outcomes)
        self.done(outcomes)


def check_landing(kv: ShadowKv, effect: PullBlocks, generations: dict[int, int]) -> None:
    """Whatever became of it: no landing block may be somebody else's while a copy into it runs."""
    for block in effect.blocks:
        if kv.generations[block.landing_block] != generations[block.landing_block]:
            raise InvariantBroken("a landing block was given away while a copy into it ran")
