"""What `eval-engine` asks: the fixed text beside this file as tokens, and prompts that are cut out of it."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from common.engine.model_card import model_card
from common.engine.model_files import ModelFolder
from common.values.errors import ModelError
from common.values.model_card import ModelCard

_TEXT_FILE = Path(__file__).with_name("eval_engine_text.txt")
SHORTEST_PROMPT = 5
LONGEST_PROMPT = 900
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """`text` is scored as a whole; `prompts` are continued."""

    card: ModelCard
    text: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]


def fixed_material(folder: ModelFolder, cache_dir: Path, *, prompts: int, new_tokens: int) -> Material:
    """Raises ModelError for a model whose context cannot hold it."""
    card = model_card(folder, cache_dir=cache_dir)
    tokens = Tokenizer.from_buffer(card.tokenizer).encode(_TEXT_FILE.read_text(encoding="utf-8")).ids
    longest = min(LONGEST_PROMPT, len(tokens) // 2, card.max_model_len - new_tokens - 1)
    if longest < SHORTEST_PROMPT:
        raise ModelError(f"{folder.name} takes {card.max_model_len} tokens, too few for a prompt and {new_tokens} more")
    return Material(
        card=card,
        text=tuple(tokens[: card.max_model_len]),
        prompts=tuple(_prompt(tokens, number, prompts, longest) for number in range(prompts)),
    )


def _prompt(tokens: list[int], number: int, count: int, longest: int) -> tuple[int, ...]:
    """Places spread evenly over the text. Lengths spread evenly over their logarithm, shuffled by the golden section, so that
    neighbours differ; the first is the longest."""
    shortness = number * _GOLDEN % 1.0
    length = round(longest * (SHORTEST_PROMPT / longest) ** shortness)
    start = number * (len(tokens) - length) // count
    return tuple(tokens[start : start + length])
