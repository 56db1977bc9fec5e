"""Tokenizers built from a vocabulary: exact cuts, round trips, and SentencePiece's own order of merging."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.engine.gguf_reader import GgufFile
from common.engine.tokenizer_from_gguf import tokenizer_from_gguf
from common.engine.tokenizer_of_bytes import byte_tokenizer
from common.engine.tokenizer_splits import splitting_of
from common.values.errors import ModelError
from tests.tiny_models import GgufMaker

TEXTS = st.text(max_size=60)
KNOWN = ("default", "gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken")


def pieces(name: str, text: str) -> list[str]:
    """The cuts, as the stretches of `text` that they cover."""
    return [text[start:end] for _, (start, end) in splitting_of(name).pre_tokenizer().pre_tokenize_str(text)]


@given(TEXTS)
@pytest.mark.parametrize("name", KNOWN)
def test_the_pieces_are_the_text(name: str, text: str) -> None:
    assert "".join(pieces(name, text)) == text


def test_the_digits_of_each_family() -> None:
    assert pieces("gpt-2", "in 20245") == ["in", " 20245"]
    assert pieces("smollm", "in 20245") == ["in", " ", "2", "0", "2", "4", "5"]
    assert pieces("qwen2", "in 20245") == ["in", " ", "2", "0", "2", "4", "5"]
    assert pieces("llama-bpe", "in 20245") == ["in", " ", "202", "45"]
    assert pieces("gpt-4o", "in 20245") == ["in", " ", "202", "45"]
    assert pieces("tekken", "in 20245") == ["in", " ", "2", "0", "2", "4", "5"]


def test_words_contractions_and_lines() -> None:
    assert pieces("llama-bpe", "I'LL go\n\n  on!!\n") == ["I", "'LL", " go", "\n\n", " ", " on", "!!\n"]
    assert pieces("gpt-4o", "camelCase it's") == ["camel", "Case", " it's"]


def test_an_unknown_cut_is_never_guessed() -> None:
    with pytest.raises(ModelError, match="novel"):
        splitting_of("novel")


@given(TEXTS)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer(300)
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert Tokenizer.from_str(tokenizer.to_str()).encode(text).ids == ids


def test_a_small_vocabulary_has_fewer_bytes() -> None:
    assert byte_tokenizer(100).get_vocab_size() == 100
    assert byte_tokenizer(100).decode([65, 250]) == "A"


ALPHABET = "▁abc"
WORDS = ["ab", "bc", "abc", "▁a", "▁ab", "▁abc", "ca", "aa", "▁▁", "cab"]
SCORES = [-3.0, -1.0, -5.0, -2.0, -4.0, -6.0, -2.5, -7.0, -8.0, -9.0]


def scored(tmp_path: Path, *, prefix: bool) -> tuple[Tokenizer, dict[str, tuple[int, float]]]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *ALPHABET]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(WORDS) + len(ALPHABET))
    scores = [0.0] * 259 + SCORES + [-100.0 - place for place in range(len(ALPHABET))]
    path = tmp_path / f"{prefix}.gguf"
    if not path.exists():
        GgufMaker(path, "llama").scored_vocabulary(tokens, scores, kinds, prefix=prefix).write()
    by_text = {token: (number, scores[number]) for number, token in enumerate(tokens) if kinds[number] == 1}
    return tokenizer_from_gguf(GgufFile(path)), by_text


def merged_by_score(text: str, known: dict[str, tuple[int, float]]) -> list[int]:
    """SentencePiece as published: join the neighbours with the best-scored union, the leftmost first, until none is left."""
    parts = list(text)
    while True:
        unions = [(known[parts[at] + parts[at + 1]][1], -at) for at in range(len(parts) - 1) if parts[at] + parts[at + 1] in known]
        if not unions:
            return [known[part][0] for part in parts]
        at = -max(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(alphabet=" abc", min_size=1, max_size=25))
def test_scored_merges_are_sentencepieces(tmp_path: Path, text: str) -> None:
    tokenizer, known = scored(tmp_path, prefix=True)
    assert tokenizer.encode(text, add_special_tokens=False).ids == merged_by_score(("▁" + text).replace(" ", "▁"), known)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=TEXTS.filter(lambda text: "<" not in text and "▁" not in text))
@pytest.mark.parametrize("prefix", [True, False])
def test_scored_vocabularies_round_trip_any_text_by_bytes(tmp_path: Path, text: str, prefix: bool) -> None:
    tokenizer, _ = scored(tmp_path, prefix=prefix)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_first_token_is_added_once_and_only_when_asked_for(tmp_path: Path) -> None:
    tokenizer, _ = scored(tmp_path, prefix=True)
    assert tokenizer.encode("abc").ids[0] == 1
    assert 1 not in tokenizer.encode("abc", add_special_tokens=False).ids
