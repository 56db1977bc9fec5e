"""Requests that take down whoever computes them: two workers, never a third; and their neighbours finish."""

from collections.abc import Sequence
from typing import Any

from tests.faults.fault import Act, Fault, armed
from tests.faults.fault_client import MODEL, Record, run
from tests.faults.fault_mesh import WORKERS, FaultMesh

GROUP = "poison"
POISON = 48_888
"""A token of the vocabulary that no other prompt of the suite has."""
PROMPT = [POISON, *range(1000, 1040)]
MOST_LOST = 2


def poison_faults() -> list[Fault]:
    at = len(PROMPT) + 12
    return [
        _poison("a prompt kills whoever prefills it", f"prefill.step_started=kill,token={POISON}", is_everyday=True),
        _poison("a sequence kills whoever computes position 53", f"step.position=kill,token={POISON},at={at}"),
        _poison("a sequence freezes whoever computes position 53", f"step.position=stop,token={POISON},at={at}"),
    ]


def _poison(name: str, failpoint: str, *, is_everyday: bool = False) -> Fault:
    return Fault(
        name=name,
        group=GROUP,
        armed=armed(tuple(WORKERS), failpoint),
        stays_armed=True,
        inject=_ask_poison(failpoint),
        is_everyday=is_everyday,
    )


def _ask_poison(failpoint: str) -> Act:
    async def ask(mesh: FaultMesh) -> Sequence[str]:
        """Who wakes up too early is found innocent: it goes on from where it was."""
        taken = mesh.taken_down()
        body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True}
        mesh.sleep_on = True
        record = await run(Record("poison", "/v1/completions", body), mesh.gateway_urls)
        mesh.sleep_on = False
        unmet = []
        if "request_poisoned" not in (record.error or ""):
            unmet.append(f"the poison ended with {record.error or 'an answer'} instead of request_poisoned")
        if (lost := mesh.taken_down() - taken) != MOST_LOST:
            unmet.append(f"{failpoint} took {lost} workers down, not {MOST_LOST}")
        return unmet

    return ask
