"""All that a gateway needs to know of a model to turn text into tokens and back. Workers publish it; gateways hold no model files."""

from dataclasses import dataclass, field

from common.values.ids import ModelKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """`tokenizer` is a `tokenizer.json` as bytes; `chat_template` is Jinja source, None where the model has none.

    `special_tokens` maps names (`bos_token`, `eos_token`, …) to their text, as chat templates expect them.
    `eos_token_ids` end a generation unless `ignore_eos` is set. `created` is seconds since the epoch.
    """

    model: ModelKey
    max_model_len: int
    vocab_size: int
    tokenizer: bytes
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    created: int = 0
    architecture: str = ""
    dtype: str = ""
