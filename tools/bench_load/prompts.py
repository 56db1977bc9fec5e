"""Prompts of an exact number of tokens, no two alike: what was sent before must not be in anybody's prefix cache.

As token ids (completions only), or as words that are one token each: which words are is asked of the server, by the number of
prompt tokens that it counts, so that no tokenizer is needed for any endpoint.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tools.bench_load.bench_refused import BenchRefused

CountTokens = Callable[[str], Awaitable[int]]
"""The prompt tokens that the server counts for a text, template included."""

_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line
end member law car city name team minute idea body back parent face level office door health person art war history
party result change morning reason research girl guy moment air teacher force
"""
WORDS = tuple(_COMMON.split())
MIN_WORDS = 20


@dataclass(frozen=True, slots=True)
class WordPrompts:
    """`overhead_tokens`: what a template adds to the words. Every text begins with the first word, for without a space before
    it a word may be another number of tokens."""

    words: tuple[str, ...]
    overhead_tokens: int

    def text(self, tokens: int, rng: random.Random) -> str:
        """Of exactly that many tokens in all, at least one of them a word."""
        if tokens <= self.overhead_tokens:
            raise BenchRefused(f"a prompt of {tokens} tokens is too short: the template alone takes {self.overhead_tokens}")
        return " ".join([self.words[0], *rng.choices(self.words, k=tokens - self.overhead_tokens - 1)])


@dataclass(frozen=True, slots=True)
class IdPrompts:
    """Ids from `low` up to, not including, `high`."""

    low: int
    high: int

    def ids(self, tokens: int, rng: random.Random) -> list[int]:
        return [rng.randrange(self.low, self.high) for _ in range(tokens)]


Prompts = WordPrompts | IdPrompts


def parse_vocabulary(text: str) -> IdPrompts:
    try:
        low, high = map(int, text.split(":"))
    except ValueError:
        low, high = 0, 0
    if not 0 <= low < high:
        raise BenchRefused(f"vocabulary {text!r}: LOW:HIGH, for example 100:40000")
    return IdPrompts(low, high)


async def learn_words(count: CountTokens, words: Sequence[str] = WORDS) -> WordPrompts:
    """The words that the server's tokenizer makes one token of, and what its template adds."""
    first = words[0]
    alone, twice = await count(first), await count(f"{first} {first}")
    if twice != alone + 1:
        raise BenchRefused("the server's tokenizer splits common English words; use --api completions --prompt ids")
    single = await _single(count, first, alone, words[1:])
    if len(single) < MIN_WORDS:
        raise BenchRefused(f"the server's tokenizer knows only {len(single)} of {len(words)} common words")
    return WordPrompts((first, *single), alone - 1)


async def _single(count: CountTokens, first: str, alone: int, words: Sequence[str]) -> tuple[str, ...]:
    """One question where all are one token each; else both halves are asked for."""
    if not words or await count(" ".join((first, *words))) == alone + len(words):
        return tuple(words)
    if len(words) == 1:
        return ()
    middle = len(words) // 2
    left = await _single(count, first, alone, words[:middle])
    return left + await _single(count, first, alone, words[middle:])
