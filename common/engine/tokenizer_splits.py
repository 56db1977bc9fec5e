"""How text is cut into pieces before byte-pair merging, for each `tokenizer.ggml.pre` name that Segue knows.

The cut decides which tokens are possible at all: a tokenizer that forgets that SmolLM cuts between digits still round-trips every
text, and quietly gives the model tokens that it never saw in training. So an unknown name is an error, never a guess.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from common.values.errors import ModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"


def _plain_words(digits: str) -> str:
    """cl100k's rule and its descendants; they differ in how many digits stay together."""
    return _CONTRACTIONS + _WORD + "|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST


def _cased_words(digits: str, contractions: str) -> str:
    """o200k's rule and its descendants: words are cut where lower case turns to upper case."""
    first = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+" + contractions
    second = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*" + contractions
    return f"{first}|{second}|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """`regex` None means GPT-2's own rule. `whole_words_first`: a piece that is a token is taken without merging."""

    regex: str | None = None
    single_digits: bool = False
    compose_unicode: bool = False
    whole_words_first: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.regex is not None:
            steps.append(pre_tokenizers.Split(Regex(self.regex), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.regex is None))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.compose_unicode else None


def splitting_of(name: str) -> Splitting:
    """The splitting that llama.cpp's name stands for. Raises ModelError for a name that is not known here."""
    match name:
        case "default" | "gpt-2" | "olmo" | "phi-2":
            return Splitting()
        case "smollm" | "starcoder" | "refact" | "codeshell":
            return Splitting(single_digits=True)
        case "llama-bpe" | "llama3" | "llama-v3":
            return Splitting(regex=_plain_words(r"\p{N}{1,3}"), whole_words_first=True, adds_bos=True)
        case "dbrx":
            return Splitting(regex=_plain_words(r"\p{N}{1,3}"))
        case "qwen2" | "deepseek-r1-qwen":
            return Splitting(regex=_plain_words(r"\p{N}"), compose_unicode=True)
        case "gpt-4o":
            return Splitting(regex=_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"))
        case "tekken":
            return Splitting(regex=_cased_words(r"\p{N}", ""), whole_words_first=True)
        case _:
            raise ModelError(
                f"the GGUF file's pre-tokeniser is {name!r}, which Segue does not know. Use the model's safetensors folder"
            )
