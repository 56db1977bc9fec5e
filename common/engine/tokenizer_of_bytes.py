"""The tokenizer of a model that has none: random weights of a bare configuration still need text in and text out."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """One token a byte (ids 0 to 255, as far as the vocabulary reaches); ids above that decode to nothing."""
    alphabet = _alphabet_in_byte_order()[: max(1, vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet_in_byte_order() -> list[str]:
    """GPT-2's printable stand-ins: a printable Latin-1 byte is itself, the others are numbered from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [stand_ins.get(byte, chr(byte)) for byte in range(256)]
