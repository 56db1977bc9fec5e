"""Tokenizer and chat template from a model card."""

from dataclasses import replace
from datetime import datetime

import pytest
from tokenizers import Tokenizer, processors

from common.values.errors import ContextTooLong, InvalidRequest, ModelError, Overloaded
from services.gateway.text.chat_template import ChatTemplate
from services.gateway.text.text_model import TextModel
from services.gateway.text.text_thread import TextModels, TextThread
from services.gateway.text.token_bytes import TokenBytes
from tests.gateway_twin import BOS, IM_START, SAYINGS, tiny_card, tiny_tokenizer


def test_chat_is_rendered_once_with_its_special_tokens() -> None:
    model = TextModel(tiny_card())
    ids = model.encode_chat([{"role": "user", "content": "hello"}])
    assert model.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == IM_START
    assert BOS not in ids


def test_a_bos_that_the_text_brings_is_not_doubled() -> None:
    adding = Tokenizer.from_str(tiny_tokenizer().to_str())
    adding.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    model = TextModel(replace(tiny_card(), tokenizer=adding.to_str().encode()))
    assert model.encode("<s>one") == model.encode("one")
    assert model.encode("one").count(BOS) == 1
    assert BOS not in model.encode("one", add_special_tokens=False)
    assert TextModel(tiny_card()).encode("<s><s>one").count(BOS) == 2, "a tokenizer that adds none doubles none"


def test_token_bytes_concatenate_to_the_text() -> None:
    model = TextModel(tiny_card())
    for saying in SAYINGS:
        ids = tiny_tokenizer().encode(saying).ids
        assert b"".join(model.token_bytes(token) for token in ids).decode() == saying
    assert model.token_bytes(10**6) == b""


def test_token_bytes_of_a_byte_fallback_vocabulary() -> None:
    class Pieces:
        def id_to_token(self, id: int) -> str | None:
            return ["▁hello", "<0xE2>", "é"][id]

    pieces = TokenBytes(Pieces(), byte_level=False, added={3: "<s>"})
    assert [pieces.of(token) for token in range(4)] == [b" hello", b"\xe2", "é".encode(), b"<s>"]


def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenised() -> None:
    model = TextModel(tiny_card(max_model_len=16))
    with pytest.raises(ContextTooLong, match="holds 16 tokens"):
        model.encode("x" * 100_000)


def test_half_a_surrogate_pair_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest):
        TextModel(tiny_card()).encode("\ud800")


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        TextModel(tiny_card(chat_template=None)).encode_chat([{"role": "user", "content": "hello"}])


def test_broken_cards_are_model_errors() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        TextModel(tiny_card(chat_template="{% if %}"))


def render(source: str, **variables: object) -> str:
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>"}, now=lambda: datetime(2026, 2, 3))
    return template.render([{"role": "user", "content": "<b>é"}], arguments=variables)


def test_helpers_that_templates_expect() -> None:
    assert render("{{ bos_token }}{{ strftime_now('%d %b %Y') }}") == "<s>03 Feb 2026"
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<b>é"}'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ mode }}{% endgeneration %}", mode="think") == "think"
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[0].missing.field }}", "{{ 1 / 0 }}", "{{ range(10**9) }}"],
)
def test_a_template_is_confined_and_its_failures_are_answers(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


async def test_long_texts_queue_up_to_a_bound() -> None:
    thread = TextThread(max_waiting_characters=9_999)
    try:
        assert await thread.run(lambda: "short", characters=10) == "short"
        with pytest.raises(Overloaded):
            await thread.run(lambda: "long", characters=10_000)
    finally:
        thread.close()


async def test_models_are_built_once() -> None:
    thread = TextThread()
    try:
        models = TextModels(thread)
        assert await models.get(tiny_card()) is await models.get(tiny_card())
    finally:
        thread.close()
