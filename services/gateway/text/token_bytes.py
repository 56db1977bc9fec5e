"""The bytes that a single token stands for.

A token of a byte-level vocabulary may be a part of a character, which no string can show; log-probabilities therefore
carry bytes. The concatenated bytes of a sequence's tokens are its text in UTF-8 (up to a decoder's stripping of a first blank).
"""

import re
from typing import Protocol

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(Protocol):
    def id_to_token(self, id: int) -> str | None: ...


class TokenBytes:
    """`of(token)`, remembered: at most one entry a token of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, *, byte_level: bool, added: dict[int, str]) -> None:
        self._vocabulary = vocabulary
        self._byte_of = _byte_level_alphabet() if byte_level else None
        self._known = {token: content.encode() for token, content in added.items()}

    def of(self, token: int) -> bytes:
        """Empty for an id that the tokenizer does not have (a vocabulary padded to a round size)."""
        known = self._known.get(token)
        if known is None:
            text = self._vocabulary.id_to_token(token)
            if text is None:
                return b""
            known = self._known[token] = self._bytes_of_text(text)
        return known

    def _bytes_of_text(self, text: str) -> bytes:
        if self._byte_of is not None:
            try:
                return bytes(self._byte_of[character] for character in text)
            except KeyError:
                return text.encode()
        if fallback := _BYTE_FALLBACK.fullmatch(text):
            return bytes([int(fallback.group(1), 16)])
        return text.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
