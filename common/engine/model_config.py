"""What a model's `config.json` says, as far as memory, KV cache and text need it; and what Segue refuses at first sight.

Read without torch and without transformers: the command that starts a mesh checks a model before any worker exists, and a gateway's
machine may have neither. The worker compares this reading with what transformers makes of the same file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.values.errors import ModelError

_HEAD_DIM_DEFAULTS = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "qwen3_moe": 128}
_STANDARD_LAYERS = ("full_attention", "sliding_attention", "attention")
_MAX_CONFIG_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`stored_dtype` is the dtype named by the configuration, "" where it names none."""

    architecture: str
    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    experts: int = 1
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: str = ""


class JsonFields:
    """A JSON object read with types; complaints name the file and the field."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise ModelError(f"{path} is too large for a configuration")
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{path} should hold a JSON object")
        self._content = content

    def has(self, *names: str) -> bool:
        return any(self._content.get(name) is not None for name in names)

    def optional_integer(self, *names: str) -> int | None:
        """The first of these names that is there."""
        for name in names:
            value = self._content.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if value is not None and not isinstance(value, list):
                raise ModelError(f"{self._path}: {name} should be a whole number")
        return None

    def integer(self, *names: str) -> int:
        value = self.optional_integer(*names)
        if value is None or value < 1:
            raise ModelError(f"{self._path}: {names[0]} should be a whole number of at least 1")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """One number or a list of them."""
        value = self._content.get(name)
        items = value if isinstance(value, list) else [value]
        return tuple(item for item in items if isinstance(item, int) and not isinstance(item, bool))

    def text(self, *names: str) -> str:
        return next((value for name in names if isinstance(value := self._content.get(name), str)), "")

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._content.get(name)
        return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()

    def mapped_texts(self, name: str) -> tuple[str, ...]:
        """The texts that an inner object maps to."""
        value = self._content.get(name)
        return tuple(item for item in value.values() if isinstance(item, str)) if isinstance(value, dict) else ()

    def token_text(self, name: str) -> str | None:
        """A token of tokenizer_config.json: a text, or an object whose `content` is one."""
        value = self._content.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def named_text(self, name: str, wanted: str) -> str | None:
        """A text, or out of a list of `{"name": …, "template": …}` the text of the one that is called `wanted`, else the first."""
        value = self._content.get(name)
        if not isinstance(value, list):
            return value if isinstance(value, str) else None
        texts = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        found = texts.get(wanted, next(iter(texts.values()), None))
        return found if isinstance(found, str) else None

    def flag(self, name: str) -> bool:
        return self._content.get(name) is True


def read_config(path: Path) -> ModelConfig:
    """Raises ModelError for a configuration that is damaged, or of a model that Segue does not serve."""
    fields = JsonFields(path)
    _refuse_unserved(path, fields)
    heads = fields.integer("num_attention_heads", "n_head")
    hidden = fields.integer("hidden_size", "n_embd")
    model_type = fields.text("model_type")
    head_dim = fields.optional_integer("head_dim") or _HEAD_DIM_DEFAULTS.get(model_type, hidden // heads)
    return ModelConfig(
        architecture=next(iter(fields.texts("architectures")), model_type),
        model_type=model_type,
        layers=fields.integer("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        intermediate_size=fields.optional_integer("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        heads=heads,
        kv_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("max_position_embeddings", "n_positions", "n_ctx"),
        experts=fields.optional_integer("num_local_experts", "num_experts", "n_routed_experts") or 1,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=fields.integers("eos_token_id"),
        stored_dtype=fields.text("dtype", "torch_dtype"),
    )


def _refuse_unserved(path: Path, fields: JsonFields) -> None:
    if not fields.text("model_type"):
        raise ModelError(f"{path} has no model_type: it is not the configuration of a transformers model")
    name = next(iter(fields.texts("architectures")), fields.text("model_type"))
    if fields.flag("is_encoder_decoder") or fields.has("vision_config", "audio_config", "text_config"):
        raise ModelError(f"{name} is not a decoder-only text model, which is what Segue serves")
    if fields.has("quantization_config"):
        raise ModelError(f"{name} is stored quantised ({path}); Segue loads plain safetensors, or a GGUF file")
    if fields.has("kv_lora_rank", "global_head_dim", "num_kv_shared_layers"):
        raise ModelError(f"{name} keeps its KV cache in a form of its own; Segue serves models with standard attention")
    others = set(fields.texts("layer_types")) - set(_STANDARD_LAYERS)
    if others:
        raise ModelError(f"{name} has {', '.join(sorted(others))} layers; Segue serves models with standard attention")
