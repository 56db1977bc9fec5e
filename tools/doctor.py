"""`segue doctor`: looks at this machine and says, a line each, what is well, what is not, and what to do about it."""

import argparse
import json
import sys
from collections.abc import Sequence

from tools.doctor_checks import Finding, all_checks
from tools.doctor_ucx import ucx_findings

EXIT_FAILED = 1


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="segue doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--port", type=int, default=8000, help="the port that the gateway is to have (default: %(default)s)")
    options = parser.parse_args(arguments)
    findings = [*all_checks(port=options.port), *ucx_findings()]
    print(as_json(findings) if options.json else as_text(findings))
    return EXIT_FAILED if any(finding.verdict == "fail" for finding in findings) else 0


def as_text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<4}  {finding.name:<{width}}  {finding.found}")
        if finding.advice and finding.verdict != "ok":
            lines.append(f"      {'':<{width}}  → {finding.advice}")
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in ("ok", "warn", "fail")}
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    rows = [{"name": item.name, "verdict": item.verdict, "found": item.found, "advice": item.advice} for item in findings]
    return json.dumps({"ok": all(item.verdict != "fail" for item in findings), "findings": rows}, indent=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
