"""Draws are a pure function of (seed, choice, position), and uniform."""

import pytest

from common.engine.draws import philox4x32, uniform

# Known answers of the algorithm's authors (Random123, kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == expected


def test_every_argument_matters_and_nothing_is_remembered() -> None:
    places = [(seed, choice, position) for seed in (0, 1, 2**40) for choice in (0, 1) for position in (0, 1, 2**33)]
    numbers = [uniform(seed=s, choice=c, position=p) for s, c, p in places]
    assert len(set(numbers)) == len(places)
    again = [uniform(seed=s, choice=c, position=p) for s, c, p in reversed(places)]
    assert again == numbers[::-1]


def test_draws_are_uniform_along_positions_and_along_seeds() -> None:
    for numbers in (
        [uniform(seed=7, choice=0, position=i) for i in range(20_000)],
        [uniform(seed=i, choice=0, position=3) for i in range(20_000)],
    ):
        assert min(numbers) >= 0.0
        assert max(numbers) < 1.0
        cells = [0] * 50
        for number in numbers:
            cells[int(number * 50)] += 1
        chi_square = sum((count - 400) ** 2 / 400 for count in cells)
        assert chi_square < 94.4  # 49 degrees of freedom: exceeded once in 10,000 samples
