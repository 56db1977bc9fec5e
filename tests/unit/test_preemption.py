"""Who gives up its blocks."""

from hypothesis import given
from hypothesis import strategies as st

from common.policy.preemption import Candidate, choose_victim

CANDIDATES = st.lists(st.tuples(st.integers(0, 99), st.booleans()), unique_by=lambda pair: pair[0], max_size=8).map(
    lambda pairs: [Candidate(handle=1000 + arrived, arrived=arrived, protected=protected) for arrived, protected in pairs]
)


@given(CANDIDATES)
def test_the_youngest_goes_but_never_the_oldest_and_nobody_that_a_peer_was_offered(candidates: list[Candidate]) -> None:
    by_age = sorted(candidates, key=lambda candidate: candidate.arrived)
    victims = [candidate.handle for candidate in by_age[1:] if not candidate.protected]
    assert choose_victim(candidates) == (victims[-1] if victims else None)
