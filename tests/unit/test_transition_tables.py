"""The tables of hand-offs, token streams and sequences: all states can be reached and lead to an end, and ends are final."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from common.mesh import sequence_life
from common.mesh.sequence_life import Phase
from common.protocol import handoff_receiver, handoff_sender, token_stream
from common.protocol.handoff_receiver import ReceiverState
from common.protocol.handoff_sender import ENDS, SenderState
from common.protocol.token_stream import StreamState

Table = Mapping[Any, Mapping[Any, Enum]]


def test_the_life_of_a_sequence_leads_to_its_release() -> None:
    table = sequence_life.TRANSITIONS
    assert set(table) == reachable(table, Phase.WAITING) | reachable(table, Phase.LANDING) == set(Phase)
    assert [phase for phase, events in table.items() if not events] == [Phase.RELEASED]
    assert all(Phase.RELEASED in reachable(table, phase) for phase in table)


def reachable(table: Table, start: Enum) -> set[Enum]:
    seen, new = {start}, [start]
    while new:
        following = set(table[new.pop()].values()) - seen
        seen |= following
        new += following
    return seen


@pytest.mark.parametrize(
    ("table", "first", "ends"),
    [
        (handoff_sender.TRANSITIONS, SenderState.OFFERED, set(ENDS)),
        (handoff_receiver.TRANSITIONS, ReceiverState.QUEUED, {ReceiverState.RUNNING, ReceiverState.RELEASED}),
        (token_stream.TRANSITIONS, StreamState.FLOWING, {StreamState.ENDED}),
    ],
    ids=["sender", "receiver", "stream"],
)
def test_every_state_is_reached_and_leads_to_an_end(table: Table, first: Enum, ends: set[Enum]) -> None:
    assert set(table) == reachable(table, first) == set(type(first))
    assert {state for state, events in table.items() if not events} == ends
    for state in table:
        assert reachable(table, state) & ends


def test_no_sender_decodes_again_once_the_right_to_emit_has_gone() -> None:
    assert SenderState.KEPT not in reachable(handoff_sender.TRANSITIONS, SenderState.LAST_SENT)
