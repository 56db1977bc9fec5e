"""`./tools/test`: style, types, import contracts, then the tests; at the end, what was not run and why.

usage: ./tools/test [--all] [--tests-only] [arguments of pytest]
       ./tools/test --faults [--only TEXT] [--real-model] [--repeat N]
       ./tools/test --soak [--minutes N] [--seed N] [--clients N]

  --all         the heavy suites too (marker `slow`)
  --faults      kill and freeze every process of a mesh at every phase, cut its network, poison it, let its clients leave, and print
                a table of what became of the streams
  --soak        ten minutes of mixed load with random deaths: nothing lost, nothing wrong, memory flat
  --tests-only  pytest alone, for quick rounds

All parts run even where one fails; the exit status is 0 only where all succeeded. Nothing here needs root.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS_COLLECTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A check that is a command; it succeeded where its exit status is 0."""

    name: str
    command: tuple[str, ...]


CHECKS = (
    Part(name="ruff check", command=(sys.executable, "-m", "ruff", "check", ".")),
    Part(name="ruff format --check", command=(sys.executable, "-m", "ruff", "format", "--check", ".")),
    Part(name="mypy", command=(sys.executable, "-m", "mypy")),
    Part(name="lint-imports", command=(str(Path(sys.executable).parent / "lint-imports"),)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TestOutcome:
    """`closing_line` is pytest's last; `skipped` counts tests by reason."""

    __test__ = False

    status: int
    closing_line: str
    skipped: Counter[str]


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    for flag, module in (("--faults", "tests.faults.run_faults"), ("--soak", "tests.faults.soak")):
        if flag in given:
            given.remove(flag)
            return subprocess.run([sys.executable, "-m", module, *given], cwd=ROOT, check=False).returncode
    everything, tests_only = "--all" in given, "--tests-only" in given
    for_pytest = [argument for argument in given if argument not in ("--all", "--tests-only")]
    failed = [] if tests_only else [part.name for part in CHECKS if not _succeeds(part)]
    tests = run_pytest(for_pytest, everything=everything)
    if tests.status != 0:
        failed.append("pytest")
    for line in closing_lines(failed, tests, not_run(everything=everything, tests_only=tests_only, narrowed=bool(for_pytest))):
        print(line)
    return 1 if failed else 0


def run_pytest(arguments: Sequence[str], *, everything: bool) -> TestOutcome:
    """Run pytest, its output passed through as it comes."""
    with tempfile.TemporaryDirectory(prefix="segue-test-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *_selection(arguments, everything=everything), *arguments]
        if sys.stdout.isatty():
            command.insert(3, "--color=yes")
        _announce("pytest", command)
        closing = ""
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace") as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                closing = line.rstrip() if line.strip() else closing
        return TestOutcome(status=process.returncode, closing_line=closing, skipped=skip_reasons(report))


def _selection(arguments: Sequence[str], *, everything: bool) -> list[str]:
    return [] if everything or "-m" in arguments else ["-m", "not slow"]


def skip_reasons(report: Path) -> Counter[str]:
    """How many tests were skipped, by the reason that they gave."""
    if not report.is_file():
        return Counter()
    found = ElementTree.parse(report).getroot().iter("skipped")
    return Counter((item.get("message") or "no reason given").splitlines()[0] for item in found)


def not_run(*, everything: bool, tests_only: bool, narrowed: bool) -> list[str]:
    """Parts that this run left out as a whole, each with its reason."""
    parts = []
    if tests_only:
        parts.append("ruff, mypy, lint-imports: --tests-only was given")
    if narrowed:
        parts.append("tests that the arguments for pytest leave out")
    if not everything:
        parts.append("heavy suites (marker `slow`), containers among them: run ./tools/test --all")
    parts.append("all but five faults on real processes: run ./tools/test --faults; the soak: ./tools/test --soak")
    if not any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/dxg")):
        parts.append("CUDA: there is no such device here")
    if not Path("/sys/class/infiniband").is_dir():
        parts.append("RDMA tiers of UCX: there is no such device here")
    return parts


def closing_lines(failed: Sequence[str], tests: TestOutcome, left_out: Sequence[str]) -> list[str]:
    """What a reader of the last screen needs: what was not run, what failed, and pytest's own closing line."""
    lines = ["", "Not run:"]
    lines += [f"  - {count} test{'s' if count > 1 else ''}: {reason}" for reason, count in sorted(tests.skipped.items())]
    lines += [f"  - {reason}" for reason in left_out]
    lines.append(f"Failed: {', '.join(failed)}" if failed else "All parts that ran succeeded.")
    lines.append(tests.closing_line)
    return lines


def _succeeds(part: Part) -> bool:
    _announce(part.name, part.command)
    return subprocess.run(part.command, cwd=ROOT, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def _announce(name: str, command: Sequence[str]) -> None:
    print(f"\n── {name}: {' '.join(command)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
