"""One choice's tokens to text, token by token, never cutting a character.

`DecodeStream` holds a token back while its text ends in an incomplete character. What it still holds when the sequence
ends is ours to flush, so that the concatenated deltas are the decoded sequence.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 5


class Detokenizer:
    """`prompt_tail` are the prompt's last tokens: decoders that strip a sequence's first blank must see what stood before it."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._context: list[int] = []
        self._held: list[int] = []
        for token in prompt_tail[-CONTEXT_TOKENS:]:
            self.step(token)
        if self._decoded_after_context().endswith("\ufffd"):  # a prompt cut within a character: its half is not ours to show
            self._stream, self._context = DecodeStream(skip_special_tokens=skip_special_tokens), []
            self._held = []

    def step(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        self._held.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception as error:  # the binding raises a bare Exception
            if "Invalid prefix" not in str(error):
                raise
            return self._restart()
        if not text:
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """The text of tokens still held at the end: an incomplete character becomes U+FFFD."""
        if not self._held:
            return ""
        text = self._decoded_after_context()
        self._context, self._held = self._held, []
        return text

    def _restart(self) -> str:
        """A decoder whose text for a prefix changes with what follows confuses the stream: go on with a fresh one."""
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        return self.flush()

    def _decoded_after_context(self) -> str:
        before: str = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
        whole: str = self._tokenizer.decode(self._context + self._held, skip_special_tokens=self._skip)
        return whole[len(before) :]
