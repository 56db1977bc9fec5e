"""Builds a `tokenizers` tokenizer from the vocabulary in a GGUF file: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from common.engine.gguf_reader import GgufFile
from common.engine.tokenizer_splits import splitting_of
from common.values.errors import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_SPACE = "▁"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id, and the kind of each (llama.cpp's numbers)."""

    tokens: list[str]
    kinds: list[int]

    @property
    def ids(self) -> dict[str, int]:
        """A token that stands there twice keeps its first id."""
        ids: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            ids.setdefault(token, number)
        return ids

    def text(self, number: int | None) -> str | None:
        return self.tokens[number] if number is not None and 0 <= number < len(self.tokens) else None


def read_vocabulary(file: GgufFile) -> Vocabulary:
    tokens = file.texts("tokenizer.ggml.tokens")
    kinds = [1] * len(tokens)
    if file.has("tokenizer.ggml.token_type"):
        kinds = [int(kind) for kind in file.numbers("tokenizer.ggml.token_type")]
    if not tokens or len(kinds) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens and {len(kinds)} token types do not fit")
    return Vocabulary(tokens=tokens, kinds=kinds)


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Raises ModelError for a kind of tokenizer that Segue does not build."""
    vocabulary = read_vocabulary(file)
    match kind := file.text("tokenizer.ggml.model"):
        case "gpt2":
            tokenizer = _byte_level(file, vocabulary)
        case "llama":
            tokenizer = _sentencepiece(file, vocabulary)
        case _:
            raise ModelError(f"{file.path}: Segue does not read {kind!r} tokenizers from GGUF. Use the model's safetensors folder")
    _mark_added_tokens(tokenizer, vocabulary)
    _prepend_bos(tokenizer, file, vocabulary, default=_adds_bos(file, kind))
    return tokenizer


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    splitting = splitting_of(file.text("tokenizer.ggml.pre", "default"))
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in file.texts("tokenizer.ggml.merges"))]
    try:
        model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=splitting.whole_words_first)
    except Exception as error:  # the library raises plain Exception for a merge outside the vocabulary
        raise ModelError(f"{file.path}: its tokenizer is damaged: {error}") from error
    tokenizer = Tokenizer(model)
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise ModelError(f"{file.path}: {len(vocabulary.tokens)} tokens and {len(scores)} scores do not fit")
    unknown = vocabulary.text(file.integer("tokenizer.ggml.unknown_token_id", 0))
    merges = merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.flag("tokenizer.ggml.add_space_prefix", default=True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="merged_with_previous")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_from_scores(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best; as ranked merges that is: unions by falling score,
    and for each union every way to cut it into two tokens, the earlier tokens first."""
    ids = vocabulary.ids
    ranked = sorted((-scores[number], number) for token, number in ids.items() if vocabulary.kinds[number] in (1, _USER_DEFINED))
    merges: list[tuple[str, str]] = []
    for _, number in ranked:
        token = vocabulary.tokens[number]
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges.extend(sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]])))
    return merges


def _mark_added_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens are never made from pieces of text; user-defined ones are ordinary text that stays whole."""
    special: list[AddedToken] = []
    ordinary: list[AddedToken] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            ordinary.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(ordinary)


def _adds_bos(file: GgufFile, kind: str) -> bool:
    """llama.cpp's default where the file does not say."""
    return kind == "llama" or splitting_of(file.text("tokenizer.ggml.pre", "default")).adds_bos


def _prepend_bos(tokenizer: Tokenizer, file: GgufFile, vocabulary: Vocabulary, *, default: bool) -> None:
    number = file.optional_integer("tokenizer.ggml.bos_token_id")
    bos = vocabulary.text(number)
    if number is None or bos is None or not file.flag("tokenizer.ggml.add_bos_token", default=default):
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
