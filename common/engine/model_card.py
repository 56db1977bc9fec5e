"""Makes the card that a worker publishes, so that a gateway can turn text into tokens and back without any model file."""

from pathlib import Path

from tokenizers import Tokenizer

from common.engine.model_config import JsonFields, ModelConfig
from common.engine.model_files import ModelFolder, folder_digest, text_file
from common.engine.tokenizer_of_bytes import byte_tokenizer
from common.values.errors import ModelError
from common.values.ids import ModelKey
from common.values.model_card import ModelCard

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|return|>")


def model_card(
    folder: ModelFolder,
    *,
    cache_dir: Path,
    served_name: str | None = None,
    max_model_len: int | None = None,
    dtype: str = "",
    created: int = 0,
) -> ModelCard:
    """Raises ModelError where the tokenizer is damaged, or `max_model_len` is more than the model has.

    The digest of the weights is read from the cache after the first time.
    """
    config = folder.config()
    tokenizer = _tokenizer(folder, config)
    template = _chat_template(folder)
    special = _special_tokens(folder)
    return ModelCard(
        model=model_key(folder, cache_dir=cache_dir, served_name=served_name),
        max_model_len=context_length(config, max_model_len),
        vocab_size=config.vocab_size,
        tokenizer=tokenizer.to_str().encode(),
        eos_token_ids=_eos_token_ids(folder, config, tokenizer, template, special.get("eos_token")),
        bos_token_id=config.bos_token_id,
        chat_template=template,
        special_tokens=special,
        created=created,
        architecture=config.architecture,
        dtype=dtype,
    )


def model_key(folder: ModelFolder, *, cache_dir: Path, served_name: str | None = None) -> ModelKey:
    """The group of the workers that serve this model."""
    return ModelKey(name=served_name or folder.name, revision=folder_digest(folder, cache_dir))


def context_length(config: ModelConfig, asked: int | None) -> int:
    """The model's own context, or the shorter one that was asked for."""
    if asked is None:
        return config.max_positions
    if not 1 <= asked <= config.max_positions:
        raise ModelError(f"--max-model-len {asked}: this model takes between 1 and {config.max_positions} tokens")
    return asked


def _tokenizer(folder: ModelFolder, config: ModelConfig) -> Tokenizer:
    """tokenizer.json, or one token a byte for a model of random weights that has none."""
    path = text_file(folder, "tokenizer.json")
    if path is None:
        return byte_tokenizer(config.vocab_size)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is damaged or of a newer format: {error}") from error


def _tokenizer_fields(folder: ModelFolder) -> JsonFields | None:
    path = text_file(folder, "tokenizer_config.json")
    return None if path is None else JsonFields(path)


def _chat_template(folder: ModelFolder) -> str | None:
    """`chat_template.jinja`, else the one in tokenizer_config.json (which may be a list of named ones)."""
    if (path := text_file(folder, "chat_template.jinja")) is not None:
        return path.read_text(encoding="utf-8")
    fields = _tokenizer_fields(folder)
    return None if fields is None else fields.named_text("chat_template", "default")


def _special_tokens(folder: ModelFolder) -> dict[str, str]:
    fields = _tokenizer_fields(folder)
    if fields is None:
        return {}
    return {name: token for name in _SPECIAL_NAMES if (token := fields.token_text(name)) is not None}


def _eos_token_ids(
    folder: ModelFolder, config: ModelConfig, tokenizer: Tokenizer, template: str | None, eos_token: str | None
) -> tuple[int, ...]:
    """What the generation configuration names (else the model's), the tokenizer's end, and the end of a turn in the template."""
    path = text_file(folder, "generation_config.json")
    named = () if path is None else JsonFields(path).integers("eos_token_id")
    ids = list(named or config.eos_token_ids)
    ends = [*_turn_ends(template or ""), *([] if eos_token is None else [eos_token])]
    ids += [number for token in ends if (number := tokenizer.token_to_id(token)) is not None]
    return tuple(number for number in dict.fromkeys(ids) if 0 <= number < config.vocab_size)


def _turn_ends(template: str) -> list[str]:
    """Tokens that end the assistant's turn in this template. Where turns have channels, `<|end|>` ends only one of those."""
    return [token for token in _TURN_ENDS if token in template and not (token == "<|end|>" and "<|channel|>" in template)]
