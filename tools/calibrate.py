"""`segue calibrate`: how long steps take, of this machine's engine or of any OpenAI-compatible server, as a step-time model.

segue calibrate                                    the bundled model, as a worker here would compute it
segue calibrate MODEL --dtype float32 --threads 2  any setting of a worker is taken (segue settings lists them)
segue calibrate --endpoint http://host:8000        a server from outside, within a load that is stated first

Workers begin with what is found here; `segue simulate` and `segue plan` take the file with --step-time.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.engine.model_cache import default_cache_dir
from common.policy.calibration import Calibration
from common.runtime.calibration_file import calibration_json, calibration_path, save_calibration
from common.runtime.core_claims import by_preference, hardware_siblings, own_cores, plan_cores
from common.runtime.settings import WorkerSettings
from common.runtime.settings_parse import parse_worker_settings
from common.values.errors import SegueError, SettingsError
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load_main import repository_commit
from tools.calibration.endpoint_options import EndpointOptions, endpoint_options
from tools.calibration.progress_line import ProgressLine
from tools.calibration.report import calibration_report
from tools.command import version

SERVED_WORKERS = 2
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    calibration: Calibration | None
    try:
        if given.endpoint is None:
            model = [] if given.model is None else ["--model", given.model]
            calibration = _of_engine(given, parse_worker_settings([*rest, *model], os.environ, default_role="both"))
        else:
            if rest:
                parser.error(f"--endpoint does not take {rest[0]}")
            calibration = _of_endpoint(endpoint_options(given))
        if calibration is None:
            return 0
        path = given.output or calibration_path(default_cache_dir(os.environ), calibration.subject)
        save_calibration(path, calibration)
    except (SegueError, BenchRefused, OSError) as error:
        print(f"segue calibrate: {error}", file=sys.stderr)
        return 2
    if given.json:
        sys.stdout.write(calibration_json(calibration).decode())
    else:
        print(calibration_report(calibration))
        print(f"written to {path}")
    return 0


def _of_engine(given: argparse.Namespace, settings: WorkerSettings) -> Calibration:
    if not given.seconds > 0.0:
        raise SettingsError("--seconds is above 0")
    settings = _on_worker_cores(settings)
    if settings.cores is not None:
        os.sched_setaffinity(0, settings.cores)
    from tools.calibration.engine_run import calibrate_engine  # loads torch, which should see these cores only

    bar = ProgressLine()
    try:
        return asyncio.run(
            calibrate_engine(
                settings,
                budget_s=given.seconds,
                build=build_name(),
                seed=given.seed,
                say=bar.tell,
                on_visit=lambda shape, elapsed_s: bar.draw(str(shape), elapsed_s, given.seconds, "s"),
            )
        )
    finally:
        bar.clear()


def _on_worker_cores(settings: WorkerSettings) -> WorkerSettings:
    """Those that `segue serve` would give to one of its usual two workers, unless cores or threads are named."""
    if settings.cores is not None or settings.threads is not None:
        return settings
    plan = plan_cores(by_preference(own_cores(), hardware_siblings), workers=SERVED_WORKERS)
    return replace(settings, cores=plan.workers[0])


def _of_endpoint(options: EndpointOptions) -> Calibration | None:
    from tools.calibration.endpoint_run import calibrate_endpoint

    bar = ProgressLine()
    try:
        return asyncio.run(calibrate_endpoint(options, build=build_name(), bar=bar))
    finally:
        bar.clear()


def build_name() -> str:
    return f"{version()} {repository_commit(ROOT)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="segue calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="segue calibrate [MODEL] [settings of a worker] [options] | segue calibrate --endpoint URL [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=float, default=75.0, help="time for the measuring itself (default 75)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the file there (default: the cache, where workers look)")
    parser.add_argument("--json", action="store_true", help="print the file in place of the table")
    parser.add_argument("--order", type=int, default=0, dest="seed", help="number of the order in which steps are visited")
    outside = parser.add_argument_group("a server from outside")
    outside.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server")
    outside.add_argument("--model", help="its model (default: the first that it names)")
    outside.add_argument("--api", choices=("chat", "completions"), default="chat", help="default: %(default)s")
    outside.add_argument("--api-key-file", type=Path, help="default: the environment's SEGUE_API_KEY or OPENAI_API_KEY")
    outside.add_argument("--max-requests", type=int, default=200, help="never more than that (default %(default)s)")
    outside.add_argument("--max-concurrency", type=int, default=16, help="streams at once at most (default %(default)s)")
    outside.add_argument("--max-prompt", type=int, default=1024, help="longest prompt in tokens (default %(default)s)")
    outside.add_argument("--timeout", type=float, default=120.0, help="seconds for each group of requests (default %(default)s)")
    outside.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
