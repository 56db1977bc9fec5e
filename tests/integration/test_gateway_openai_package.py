"""The gateway as the `openai` package sees it."""

import openai
import pytest

from tests.gateway_server import RunningGateway, gateway
from tests.gateway_twin import MODEL, Script, TwinMesh, saying_tokens, tiny_card, tiny_tokenizer

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]},
    {"role": "user", "content": "hello"},
]


def client_of(running: RunningGateway, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0)


async def test_streamed_chat_with_logprobs_and_two_choices() -> None:
    async with gateway() as running, client_of(running) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, n=2, logprobs=True, top_logprobs=3, max_tokens=30, seed=0
        )
        texts, data, finishes = ["", ""], [b"", b""], ["", ""]
        async for chunk in stream:
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] += choice.finish_reason or ""
            assert choice.logprobs is not None
            for token in choice.logprobs.content or ():
                assert len(token.top_logprobs) == 3
                assert token.top_logprobs[1].bytes == token.bytes
                data[choice.index] += bytes(token.bytes or ())
        assert finishes == ["length", "length"]
        for place in (0, 1):
            whole = tiny_tokenizer().decode(list(saying_tokens(place) * 5)[:30])
            assert texts[place] == whole
            assert data[place].startswith(whole.removesuffix("\ufffd").encode())
    prompt = running.mesh.requests[0].prompt
    assert tiny_tokenizer().decode(list(prompt), skip_special_tokens=True).startswith("system\nBe brief.\nBe kind.\nuser\nhello")


async def test_whole_chat_with_logprobs_counts_every_token() -> None:
    async with gateway(TwinMesh(script=Script(eos_at=12))) as running, client_of(running) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, seed=0)
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert answer.usage is not None
        assert len(choice.logprobs.content) == answer.usage.completion_tokens == 13
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 13
        assert answer.id.startswith("chatcmpl-")
        assert answer.object == "chat.completion"


async def test_completions() -> None:
    async with gateway() as running, client_of(running) as client:
        answer = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=10, logprobs=2, seed=1)
        for choice in answer.choices:
            assert choice.logprobs is not None
            assert len(choice.logprobs.tokens or ()) == 10
            assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset or ())
        stream = await client.completions.create(
            model=MODEL, prompt="a", max_tokens=10, seed=1, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer.choices[0].text
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 10


async def test_models() -> None:
    async with gateway() as running, client_of(running) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "segue"


async def test_errors_become_the_packages_exceptions() -> None:
    mesh = TwinMesh(script=Script(fail_at=3))
    async with gateway(mesh, api_keys=("right",)) as running, client_of(running, "right") as client:
        async with client_of(running, "wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        with pytest.raises(openai.NotFoundError, match="no model"):
            await client.chat.completions.create(model="none", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=1000)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="workers died"):
            async for _ in stream:
                pass


async def test_tools_reach_the_template() -> None:
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    async with gateway(TwinMesh(served=(tiny_card(chat_template=template),))) as running, client_of(running) as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "user", "content": "time?"},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            ],
            tools=[{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}],
            max_tokens=1,
        )
        shown = tiny_tokenizer().decode(list(running.mesh.requests[0].prompt), skip_special_tokens=False)
        assert '"name": "clock", "parameters": {"type": "object"}' in shown
        assert '"arguments": {"zone": "UTC"}' in shown
        assert '"tool_call_id": "c1"' in shown
