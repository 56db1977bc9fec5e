"""The `segue` command: finds the subcommand's module and hands it the rest. Nothing else is imported before that."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True, slots=True)
class Subcommand:
    """`module` has `main(arguments) -> exit status`."""

    module: str
    means: str


SUBCOMMANDS = {
    "serve": Subcommand("tools.serve", "start the whole mesh on this machine: segue serve [MODEL]"),
    "chat": Subcommand("tools.chat", "talk to a running server in the terminal"),
    "bench": Subcommand("tools.bench_load_main", "measure goodput, of Segue or any OpenAI-compatible server"),
    "doctor": Subcommand("tools.doctor", "check this machine and say what to do"),
    "settings": Subcommand("tools.settings", "list every setting: flag, environment variable, file key, default"),
    "message-reference": Subcommand("tools.message_reference", "print the page of all messages, made from the code"),
    "module-lists": Subcommand("tools.module_lists", "renew the lists of modules in the READMEs"),
    "bench-engine": Subcommand("tools.bench_engine", "measure the engine against the limits of this machine"),
    "eval-engine": Subcommand("tools.eval_engine", "prove the tokens: every way of computing against transformers"),
    "calibrate": Subcommand("tools.calibrate", "measure how long steps take, here or at any OpenAI-compatible server"),
    "plan": Subcommand("tools.plan", "say whether and how to split the work, for a demand and a number of workers"),
    "simulate": Subcommand("tools.simulate", "say how many requests would be good on a deployment, in virtual time"),
    "simulate-roles": Subcommand("tools.simulate_roles", "let roles follow a changing load in virtual time, against static splits"),
    "replay-decisions": Subcommand("tools.replay_decisions", "make the decisions of a planner's log again, byte for byte"),
    "simulate-faults": Subcommand("tools.simulate_faults", "run the whole mesh in virtual time under faults drawn from seeds"),
    "bench-transfer": Subcommand("tools.bench_transfer", "measure the ways to move KV between two processes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"segue {version()}")
        return 0
    subcommand = SUBCOMMANDS.get(given[0])
    if subcommand is None:
        print(f"segue: there is no subcommand {given[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    run = cast("Callable[[list[str]], int]", importlib.import_module(subcommand.module).main)
    try:
        return run(given[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {subcommand.means}" for name, subcommand in SUBCOMMANDS.items())
    return f"usage: segue <subcommand> [arguments]; segue <subcommand> --help says more\n\n{rows}"


def version() -> str:
    """From pyproject.toml where the project is run from its folder, else from what is installed."""
    import importlib.metadata
    import tomllib
    from pathlib import Path

    source = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if source.is_file():
        return str(tomllib.loads(source.read_text("utf-8"))["project"]["version"])
    return importlib.metadata.version("segue")


if __name__ == "__main__":
    sys.exit(main())
