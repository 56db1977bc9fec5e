"""Laws of the published prefix cache: whatever is lost on the way, a view is exact, or empty and asking, and it heals.

A real block pool goes through a random history; its pages are taken at random times and sizes, and some are lost.
"""

from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.block_hash import extend_hashes, root_hash
from common.policy.block_pool import BlockPool
from common.policy.prefix_view import ASK_AGAIN_S, PrefixView
from common.values.cache_page import NAME_BYTES, CachePage
from common.values.ids import Incarnation, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout

WORKER = WorkerId("w")
FIRST = Incarnation("1")
SEEDS = st.integers(0, 2**32)
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=4))


@dataclass
class Publisher:
    """A worker's pool with a history drawn from `random`."""

    random: Random
    incarnation: Incarnation = FIRST
    holders: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks = self.random.randint(1, 12)
        self.pool = BlockPool(blocks, [0] * blocks)

    def live(self) -> None:
        """Something happens to the pool."""
        what = self.random.randrange(4)
        if what == 0 and self.pool.can_allocate(count := self.random.randint(1, self.pool.total)):
            self.holders.append(self.pool.allocate(count))
        elif what == 1 and self.holders:
            for block in self.random.choice(self.holders):
                self.pool.name(block, bytes([self.random.randrange(20)]) * NAME_BYTES)
        elif what == 2 and self.holders:
            self.pool.release(self.holders.pop(self.random.randrange(len(self.holders))))
        elif what == 3:
            self.pool.forget(self.random.randrange(self.pool.total))

    def page(self) -> CachePage:
        page = self.pool.prefix_log.take(self.random.randint(1, 6))
        assert len(page.added + page.removed) <= 6 * NAME_BYTES
        return page


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS, events=st.integers(1, 200), lost=st.sampled_from((0.0, 0.1, 0.5, 0.95)))
def test_a_view_equals_the_pool_once_all_pages_came_and_every_gap_heals(seed: int, events: int, lost: float) -> None:
    random = Random(seed)
    view, worker, now = PrefixView(), Publisher(random), 0.0
    for _ in range(events):
        worker.live()
        if random.random() < 0.3 and random.random() >= lost:
            now += random.random()
            page = worker.page()
            asked = view.observe(WORKER, worker.incarnation, page, now)
            assert len(view.names(WORKER)) <= worker.pool.total, "the view is bounded by the pool"
            if asked and random.random() >= lost:
                worker.pool.prefix_log.restart()
        elif random.random() < 0.2:
            worker.page()  # sent, and lost
        if random.random() < 0.01:
            worker = Publisher(random, Incarnation(f"{worker.incarnation}+"))
            if random.random() >= lost:
                view.observe(WORKER, worker.incarnation, worker.page(), now)
    heal(view, worker, now)
    assert view.names(WORKER) == worker.pool.prefix_log.names


def heal(view: PrefixView, worker: Publisher, now: float) -> None:
    """From now on everything arrives; no more pages than it takes to tell the pool twice."""
    for _ in range(6 * worker.pool.total + 8):
        now += ASK_AGAIN_S / 2
        if view.observe(WORKER, worker.incarnation, worker.page(), now):
            worker.pool.prefix_log.restart()
    assert not worker.pool.prefix_log.pending


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_a_page_that_is_lost_is_noticed_by_the_next_one_with_or_without_news(seed: int) -> None:
    view, worker = PrefixView(), Publisher(Random(seed))
    (block,) = worker.pool.allocate(1)
    assert not view.observe(WORKER, worker.incarnation, worker.pool.prefix_log.take(4), 0.0)
    worker.pool.name(block, b"a" * NAME_BYTES)
    worker.pool.prefix_log.take(4)
    quiet = worker.pool.prefix_log.take(4)
    assert not quiet.is_news
    assert view.observe(WORKER, worker.incarnation, quiet, 1.0), "asks"
    assert not view.observe(WORKER, worker.incarnation, quiet, 1.1), "but not with every snapshot"
    assert view.observe(WORKER, worker.incarnation, quiet, 1.0 + ASK_AGAIN_S)
    worker.pool.prefix_log.restart()
    assert not view.observe(WORKER, worker.incarnation, worker.pool.prefix_log.take(4), 2.1)
    assert view.names(WORKER) == {b"a" * NAME_BYTES}


def test_two_listeners_may_ask_and_the_one_that_missed_the_beginning_asks_again() -> None:
    pool = BlockPool(6, [0] * 6)
    for number, block in enumerate(pool.allocate(6)):
        pool.name(block, bytes([number]) * NAME_BYTES)
    first, second, incarnation = PrefixView(), PrefixView(), Incarnation("1")
    pool.prefix_log.take(100)
    assert first.observe(WORKER, incarnation, pool.prefix_log.take(2), 0.0)
    pool.prefix_log.restart()
    assert not first.observe(WORKER, incarnation, pool.prefix_log.take(2), 0.1)
    middle = pool.prefix_log.take(2)
    assert not first.observe(WORKER, incarnation, middle, 0.2)
    assert second.observe(WORKER, incarnation, middle, 0.2)
    pool.prefix_log.restart()  # ignored: one telling at a time
    last = pool.prefix_log.take(2)
    assert not last.restart
    assert not first.observe(WORKER, incarnation, last, 0.3)
    assert first.names(WORKER) == pool.prefix_log.names
    assert not second.observe(WORKER, incarnation, last, 0.3)
    assert second.observe(WORKER, incarnation, pool.prefix_log.take(2), 2.0)
    pool.prefix_log.restart()
    for now in (2.1, 2.2, 2.3):
        page = pool.prefix_log.take(2)
        assert not first.observe(WORKER, incarnation, page, now)
        assert not second.observe(WORKER, incarnation, page, now)
    assert first.names(WORKER) == second.names(WORKER) == pool.prefix_log.names


@given(tokens=st.lists(st.integers(0, 9), max_size=40), held=st.integers(0, 10), salt=st.sampled_from((b"", b"tenant")))
def test_the_overlap_is_what_a_worker_would_not_compute(tokens: list[int], held: int, salt: bytes) -> None:
    """The last token is always computed, so a prompt of full blocks only has one block less."""
    names: list[bytes] = []
    extend_hashes(names, root_hash(FINGERPRINT, b""), tokens, 4, held)
    view = PrefixView()
    page = CachePage(number=1 if names else 0, added=b"".join(names))
    view.observe(WORKER, Incarnation("1"), page, 0.0)
    workers = {WORKER: FINGERPRINT, WorkerId("stranger"): FINGERPRINT}
    expected = 0 if salt else min(len(names), max(0, len(tokens) - 1) // 4) * 4
    assert view.overlaps(workers, tokens, salt) == ({WORKER: expected} if expected else {})
    other = Fingerprint(weights="other", dtype="float32", layout=FINGERPRINT.layout)
    assert view.overlaps({WORKER: other}, tokens, salt) == {}
