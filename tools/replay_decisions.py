"""`segue replay-decisions FILE`: makes every decision of a planner's log again, from the inputs that were logged with it.

The same inputs give the same decisions, byte for byte: the exit status is 1 where one differs. Prints the changes of roles.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.simulation.roles.decision_log import replay
from common.values.errors import SettingsError


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="segue replay-decisions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="what --decision-log wrote")
    options = parser.parse_args(arguments)
    reasons: Counter[str] = Counter()
    differ = 0
    try:
        with options.file.open("rb") as lines:
            for each in replay(lines):
                reasons[each.logged.reason] += 1
                differ += not each.same
                if (move := each.logged.move) is not None:
                    gain = f", gain {100 * each.logged.trials[0].gain:.1f} points" if each.logged.trials else ""
                    print(f"{each.logged.number:6}  {move.worker} becomes {move.role}: {each.logged.reason}{gain}")
                if not each.same:
                    print(f"{each.logged.number:6}  differs: then {each.logged}, now {each.again}")
    except (OSError, SettingsError) as error:
        print(f"segue replay-decisions: {error}", file=sys.stderr)
        return 2
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{reasons.total()} decisions ({counted}), {differ} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
