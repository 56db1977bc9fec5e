"""What the clients of a simulated mesh ask for: short prompts, often with a prefix that was there before."""

from random import Random

from common.values.sampling import SamplingParameters

MOST_CHOICES = 3


def draw_prompt(random: Random, known: list[tuple[int, ...]]) -> tuple[int, ...]:
    old = random.choice([(), *known])
    cut = random.choice([0, len(old), random.randint(0, len(old))])
    return (*old[:cut], *random.choices(range(3), k=random.randint(cut == 0, random.choice([2, 16]))))[:22]


def draw_sampling(random: Random, most_new_tokens: int) -> SamplingParameters:
    return SamplingParameters(
        max_tokens=random.choice([1, 2, most_new_tokens // 4, most_new_tokens // 2, most_new_tokens]),
        seed=random.randint(0, 3),
        ignore_eos=random.random() < 0.7,
        logprobs=random.choice([0, 0, None]),
        prompt_logprobs=random.choice([None, None, None, 0]),
    )
