"""Sharing out cores: never one twice while there are enough, never one outside the set, and claims between processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.runtime.core_claims import CoreClaims, by_preference, plan_cores, private_folder
from common.values.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]


@given(st.sets(st.integers(0, 255), min_size=1, max_size=64), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 8)))
def test_workers_get_cores_of_their_own_while_there_are_enough(cores: set[int], workers: int, threads: int | None) -> None:
    free = tuple(sorted(cores))
    plan = plan_cores(free, workers=workers, threads=threads)
    used = [core for part in plan.workers for core in part]
    assert len(plan.workers) == workers
    assert all(plan.workers)
    assert set(used) <= cores
    assert plan.shared == (len(used) != len(set(used)) or workers * (threads or 1) > len(free))
    if len(free) > workers and threads is None:
        assert len(used) < len(free), "gateway and brokers keep a core"


def test_two_workers_on_two_cores_have_one_each() -> None:
    assert plan_cores((0, 1), workers=2).workers == ((0,), (1,))
    assert plan_cores((0,), workers=2).shared
    with pytest.raises(SettingsError):
        plan_cores((), workers=1)


def test_sibling_threads_come_last() -> None:
    pairs = {core: frozenset({core % 4, core % 4 + 4}) for core in range(8)}
    assert by_preference(range(8), pairs.__getitem__) == (0, 1, 2, 3, 4, 5, 6, 7)
    neighbours = {core: frozenset({core & ~1, core | 1}) for core in range(8)}
    assert by_preference(range(8), neighbours.__getitem__) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert by_preference([1, 3], neighbours.__getitem__) == (1, 3)


def test_a_core_has_one_claimant_and_is_free_again_when_it_dies(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from common.runtime.core_claims import CoreClaims\n"
        "claims = CoreClaims(Path(sys.argv[1])); print(claims.free([0, 2]), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ours = CoreClaims(tmp_path)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"(0, 2)"
        assert ours.free([0, 1, 2, 3]) == (1, 3)
        other.kill()
    assert ours.free([0, 1, 2, 3]) == (0, 1, 2, 3)
    ours.keep_only([2])
    assert ours.held == (2,)
    assert CoreClaims(tmp_path).free([0, 2]) == (0,)
    ours.close()
    assert ours.held == ()


def test_a_private_folder_is_private(tmp_path: Path) -> None:
    folder = private_folder("cores", base=str(tmp_path))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder("cores", base=str(tmp_path)) == folder
    folder.chmod(0o777)
    with pytest.raises(SettingsError, match="0700"):
        private_folder("cores", base=str(tmp_path))
