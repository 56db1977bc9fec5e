"""The Promela model of the hand-off, checked by spin: complete searches find no broken law, and each rule that is taken out is missed.

Skipped where spin or a C compiler is missing.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("handoff.pml")
MISSING = [name for name in ("spin", "cc") if shutil.which(name) is None]
COMPILE = ("-w", "-DSAFETY", "-DVECTORSZ=1024")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What pan printed: the assertion that was violated first (None: none), states, and whether it was cut short."""

    violated: str | None
    states: int
    complete: bool


def search(
    folder: Path, *defines: str, store: str = "-DCOLLAPSE", optimise: str = "-O1", megabytes: int = 2000, limit_s: float = 110.0
) -> Search:
    """Compile and run the verifier of one variant of the model, with bounded memory and time."""
    shutil.copy(MODEL, folder / "handoff.pml")
    for command in (
        ("spin", "-a", *(f"-D{define}" for define in defines), "handoff.pml"),
        ("cc", *COMPILE, optimise, store, f"-DMEMLIM={megabytes}", "-o", "pan", "pan.c"),
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(("./pan", "-m300000"), cwd=folder, capture_output=True, text=True, timeout=limit_s)
    assert "errors:" in done.stdout, done.stdout + done.stderr
    violated = re.search(r"assertion violated (.*) \(at depth", done.stdout)
    states = re.search(r"(\d+(?:\.\d+)?(?:e\+\d+)?) states, stored", done.stdout)
    assert states is not None
    complete = "Search not completed" not in done.stdout and "max search depth too small" not in done.stdout
    return Search(violated=None if violated is None else violated[1], states=int(float(states[1])), complete=complete)


@pytest.mark.parametrize(
    "faults",
    [("CRASHES=2",), ("CRASHES=0", "LOSSES=1", "TWICE=1", "LEAVE"), ("CRASHES=0", "BREAKS=1", "LEAVE")],
    ids=" ".join,
)
def test_a_complete_search_finds_no_broken_law(tmp_path: Path, faults: tuple[str, ...]) -> None:
    found = search(tmp_path, *faults)
    assert found.violated is None
    assert found.complete
    assert found.states > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_faults_at_once_by_hash_compaction(tmp_path: Path) -> None:
    """One of each and two crashes: states are kept as hashes of 64 bits, so one may be missed with a tiny probability."""
    faults = ("CRASHES=1", "BREAKS=1", "LOSSES=1", "LEAVE")
    found = search(tmp_path, *faults, store="-DHC4", megabytes=6000, limit_s=1100.0)
    assert found.violated is None
    assert found.complete


@pytest.mark.parametrize(
    ("rule", "faults", "law"),
    [
        ("NO_GENERATION_CHECK", ("CRASHES=0", "BREAKS=1"), "content[me]==1"),
        ("NO_ATTEMPT_FILTER", ("CRASHES=1", "WATCHDOGS=1"), "a==attempt"),
        ("NO_RIGHT_TO_EMIT", ("CRASHES=0", "BREAKS=1"), "w[(1-me)].attempt==w[me].attempt"),
        ("NO_TOMBSTONE", ("CRASHES=0", "LEAVE"), "told[me]<w[me].attempt"),
        ("NO_LANDING_WAIT", ("CRASHES=1", "LEAVE"), "own[me]==1"),
    ],
)
def test_without_a_rule_a_law_breaks(tmp_path: Path, rule: str, faults: tuple[str, ...], law: str) -> None:
    found = search(tmp_path, rule, *faults, optimise="-O0")
    assert found.violated is not None
    assert law in found.violated
