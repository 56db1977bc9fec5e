"""A model as the gateway knows it: its tokenizer and chat template, from the card that its workers publish."""

from collections.abc import Mapping, Sequence

import msgspec
from tokenizers import Tokenizer

from common.values.errors import ContextTooLong, InvalidRequest, ModelError
from common.values.model_card import ModelCard
from services.gateway.text.chat_template import ChatTemplate, Message
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.token_bytes import TokenBytes


class _Decoder(msgspec.Struct):
    type: str = ""
    decoders: "list[_Decoder]" = []


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    decoder: _Decoder | None = None
    added_tokens: list[_AddedToken] = []


class TextModel:
    """Building one takes about 0.1 s; encoding a long text takes as long: both belong into the text thread."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        try:
            self._tokenizer = Tokenizer.from_buffer(card.tokenizer)
            file = msgspec.json.decode(card.tokenizer, type=_TokenizerFile)
        except Exception as error:  # the binding raises a bare Exception
            raise ModelError(f"the tokenizer of {card.model.name} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = None
        if card.chat_template is not None:
            self._template = ChatTemplate(card.chat_template, special_tokens=card.special_tokens)
        added = {token.id: token.content for token in file.added_tokens}
        self._token_bytes = TokenBytes(self._tokenizer, byte_level=_is_byte_level(file.decoder), added=added)
        self._own_bos: list[int] = self._tokenizer.encode("").ids[:1]  # what the tokenizer itself puts before a text, if anything
        self._longest_token = max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokens of a raw prompt; a `bos` that the text brings itself is not doubled.

        Raises ContextTooLong without tokenising a text that no tokenizer could fit into the context.
        """
        least = len(text) // max(self._longest_token, 1)
        if least >= self.card.max_model_len:
            raise ContextTooLong(
                f"the context of {self.card.model.name} holds {self.card.max_model_len} tokens, the prompt has at least {least}"
            )
        try:
            # The batch call releases the interpreter lock, the single one does not.
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeError, TypeError) as error:
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from error
        if add_special_tokens and self._own_bos and ids[1:2] == self._own_bos:
            del ids[0]
        return tuple(ids)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """Apply the chat template; the template writes the special tokens, so the tokenizer adds none."""
        if self._template is None:
            raise InvalidRequest(f"{self.card.model.name} has no chat template: use /v1/completions", param="messages")
        text = self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, arguments=arguments)
        return self.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool, prompt: Sequence[int]) -> Detokenizer:
        return Detokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens, prompt_tail=prompt)

    def token_bytes(self, token: int) -> bytes:
        return self._token_bytes.of(token)


def _is_byte_level(decoder: _Decoder | None) -> bool:
    if decoder is None:
        return False
    return decoder.type == "ByteLevel" or any(_is_byte_level(part) for part in decoder.decoders)
