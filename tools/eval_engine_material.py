"""What `eval-engine` asks: the fixed text beside this file as tokens, and prompts that are cut out of it."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from common.engine.model_card import model_card
from common.engine.model_files import ModelFolder
from common.values.errors import ModelError

_TEXT_FILE = Path(__file__).with_name("eval_engine_text.txt")
_SHORTEST_PROMPT = 8
_LONGEST_PROMPT = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """`text` is scored as a whole; `prompts` are continued."""

    text: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]


def fixed_material(folder: ModelFolder, cache_dir: Path, *, prompts: int, new_tokens: int) -> Material:
    """Raises ModelError for a model whose context cannot hold it."""
    card = model_card(folder, cache_dir=cache_dir)
    tokens = Tokenizer.from_buffer(card.tokenizer).encode(_TEXT_FILE.read_text(encoding="utf-8")).ids
    longest = min(_LONGEST_PROMPT, len(tokens) // 2)
    if longest + new_tokens > card.max_model_len or longest < _SHORTEST_PROMPT:
        raise ModelError(f"{folder.name} takes {card.max_model_len} tokens, too few for prompts of {longest} and {new_tokens} more")
    return Material(
        text=tuple(tokens[: card.max_model_len]),
        prompts=tuple(_prompt(tokens, number, prompts, longest) for number in range(prompts)),
    )


def _prompt(tokens: list[int], number: int, count: int, longest: int) -> tuple[int, ...]:
    """Places spread evenly over the text, lengths from the shortest to the longest in turn."""
    length = _SHORTEST_PROMPT + number * 37 % (longest - _SHORTEST_PROMPT + 1)
    start = number * (len(tokens) - longest) // count
    return tuple(tokens[start : start + length])
