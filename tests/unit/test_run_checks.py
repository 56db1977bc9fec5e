"""The last lines of the test command: what was not run and why, what failed, and pytest's closing line."""

from collections import Counter
from pathlib import Path

from tools.run_checks import TestOutcome, closing_lines, not_run, skip_reasons


def test_the_last_line_is_pytests_and_every_reason_is_told() -> None:
    tests = TestOutcome(status=1, closing_line="=== 1 failed, 3 skipped in 2s ===", skipped=Counter({"no RDMA": 2, "no GPU": 1}))
    lines = closing_lines(["pytest"], tests, ["heavy suites: --all"])
    assert lines[-1] == tests.closing_line
    assert "Failed: pytest" in lines
    assert "  - 2 tests: no RDMA" in lines
    assert "  - 1 test: no GPU" in lines
    assert "  - heavy suites: --all" in lines


def test_skip_reasons_are_counted_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert skip_reasons(report) == Counter()
    skipped = '<testcase><skipped type="pytest.skip" message="no GPU">x</skipped></testcase>'
    report.write_text(f"<testsuites><testsuite>{skipped}{skipped}<testcase/></testsuite></testsuites>")
    assert skip_reasons(report) == Counter({"no GPU": 2})


def test_left_out_parts_depend_on_what_was_asked() -> None:
    assert any("--all" in part for part in not_run(everything=False, tests_only=False, narrowed=False))
    assert not any("--all" in part for part in not_run(everything=True, tests_only=False, narrowed=False))
    assert any("--tests-only" in part for part in not_run(everything=True, tests_only=True, narrowed=False))
