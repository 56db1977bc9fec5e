"""From a parsed body to a plan: find the model, tokenise, check numbers against the context, fill in defaults."""

import hashlib
import secrets
import time
from collections.abc import Sequence

import msgspec

from common.ports.generation import MeshClient
from common.protocol.messages import MAX_CHOICES
from common.values.errors import ContextTooLong, InvalidRequest
from common.values.sampling import MAX_LOGPROBS, SamplingParameters
from services.gateway.openai.body import ChatBody, CommonBody, CompletionBody
from services.gateway.openai.chat_messages import template_messages
from services.gateway.openai.plan import RequestPlan
from services.gateway.text.stop_matcher import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from services.gateway.text.text_model import TextModel
from services.gateway.text.text_thread import TextModels, TextThread


class Planner:
    """Raises RequestError with the field's name for what the client got wrong, Overloaded where the text thread is full."""

    def __init__(self, mesh: MeshClient, thread: TextThread, *, deadline_s: float | None = None) -> None:
        self._mesh = mesh
        self._thread = thread
        self._models = TextModels(thread)
        self._deadline_s = deadline_s

    async def text_model(self, name: str) -> TextModel:
        """Raises ModelNotFound, Unavailable."""
        return await self._models.get(self._mesh.card(name))

    async def chat(self, body: ChatBody) -> RequestPlan:
        model = await self.text_model(body.model)
        messages, characters = template_messages(body.messages)
        tools = None if body.tool_choice == "none" else body.tools
        prompt = await self._thread.run(
            lambda: model.encode_chat(
                messages,
                tools=tools,
                add_generation_prompt=body.add_generation_prompt is not False,
                arguments=body.chat_template_kwargs,
            ),
            characters=characters if tools is None else max(characters, len(msgspec.json.encode(tools))),
        )
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return self._plan(
            body,
            model,
            (prompt,),
            max_tokens=(limit, "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    async def completion(self, body: CompletionBody) -> RequestPlan:
        model = await self.text_model(body.model)
        prompts = [await self._encoded(model, prompt, body) for prompt in _prompts(body.prompt)]
        echoes = None
        if body.echo:
            if body.stream and body.logprobs is not None:
                raise InvalidRequest("echo with logprobs cannot be streamed", param="echo")
            echoes = tuple(model.decode(prompt, skip_special_tokens=body.skip_special_tokens is not False) for prompt in prompts)
        return self._plan(
            body, model, tuple(prompts), max_tokens=(body.max_tokens, "max_tokens"), logprobs=body.logprobs, echoes=echoes
        )

    async def _encoded(self, model: TextModel, prompt: str | list[int], body: CompletionBody) -> tuple[int, ...]:
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            return await self._thread.run(lambda: model.encode(prompt, add_special_tokens=special), characters=len(prompt))
        size = model.card.vocab_size
        if not all(0 <= token < size for token in prompt):
            raise InvalidRequest(f"prompt holds ids outside the vocabulary (0 to {size - 1})", param="prompt")
        return tuple(prompt)

    def _plan(
        self,
        body: CommonBody,
        model: TextModel,
        prompts: tuple[tuple[int, ...], ...],
        *,
        max_tokens: tuple[int | None, str],
        logprobs: int | None,
        echoes: tuple[str, ...] | None = None,
    ) -> RequestPlan:
        chat = isinstance(body, ChatBody)
        if body.prompt_logprobs is not None and body.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options is for streams only", param="stream_options")
        return RequestPlan(
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            kind="chat" if chat else "completion",
            created=int(time.time()),
            text_model=model,
            prompts=prompts,
            prompt_tokens=sum(map(len, prompts)),
            sampling=_sampling(
                body,
                model,
                room=_room(model, prompts, *max_tokens),
                max_tokens=max_tokens[0],
                logprobs=logprobs,
                prompt_logprobs=logprobs if echoes is not None and body.prompt_logprobs is None else body.prompt_logprobs,
            ),
            n=_choices(body.n, len(prompts)),
            stops=_stops(body.stop),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
            echoes=echoes,
            salt=hashlib.blake2b(body.cache_salt.encode(), digest_size=16).digest() if body.cache_salt else b"",
            deadline_s=self._deadline_s,
        )


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """One entry per prompt; a flat list of ids is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [part for part in prompt if isinstance(part, int)]
    several = [part for part in prompt if not isinstance(part, int)]
    if ids and several:
        raise InvalidRequest("prompt mixes token ids with prompts", param="prompt")
    if len(several) > MAX_CHOICES:
        raise InvalidRequest(f"prompt may hold at most {MAX_CHOICES} prompts", param="prompt")
    return [ids] if ids else several


def _choices(n: int | None, prompts: int) -> int:
    n = 1 if n is None else n
    if n < 1 or n * prompts > MAX_CHOICES:
        raise InvalidRequest(f"n must be at least 1, and at most {MAX_CHOICES} choices may come out", param="n")
    return n


def _room(model: TextModel, prompts: Sequence[tuple[int, ...]], max_tokens: int | None, field: str) -> int:
    """Tokens that fit after the longest prompt."""
    if not prompts or not all(prompts):
        raise InvalidRequest("the prompt must hold at least one token", param="prompt")
    longest, limit = max(map(len, prompts)), model.card.max_model_len
    if longest >= limit:
        raise ContextTooLong(
            f"the context of {model.card.model.name} holds {limit} tokens, the prompt has {longest} and needs room for one more"
        )
    if max_tokens is not None and longest + max_tokens > limit:
        raise ContextTooLong(
            f"the context of {model.card.model.name} holds {limit} tokens, the prompt has {longest} and {field} asks for"
            f" {max_tokens} more, {longest + max_tokens} in all",
            param=field,
        )
    return limit - longest


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOP_STRINGS} strings", param="stop")
    if not all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in stops):
        raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters", param="stop")
    return stops


def _sampling(
    body: CommonBody, model: TextModel, *, room: int, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParameters:
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        raise InvalidRequest(f"{name} must be between 0 and {MAX_LOGPROBS}", param=name)
    return SamplingParameters(
        max_tokens=room if max_tokens is None else max_tokens,
        min_tokens=body.min_tokens or 0,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        temperature=_default(body.temperature, 1.0),
        top_p=_default(body.top_p, 1.0),
        top_k=0 if body.top_k in (None, -1) else body.top_k,
        min_p=_default(body.min_p, 0.0),
        repetition_penalty=_default(body.repetition_penalty, 1.0),
        presence_penalty=_default(body.presence_penalty, 0.0),
        frequency_penalty=_default(body.frequency_penalty, 0.0),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(_in_vocabulary(body.stop_token_ids or (), model, "stop_token_ids")),
        logit_bias=_logit_bias(body.logit_bias, model),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(bias: dict[str, float] | None, model: TextModel) -> dict[int, float]:
    try:
        by_id = {int(token): value for token, value in (bias or {}).items()}
    except ValueError as error:
        raise InvalidRequest("the keys of logit_bias must be token ids", param="logit_bias") from error
    _in_vocabulary(tuple(by_id), model, "logit_bias")
    return by_id


def _in_vocabulary(tokens: Sequence[int], model: TextModel, field: str) -> Sequence[int]:
    size = model.card.vocab_size
    if not all(0 <= token < size for token in tokens):
        raise InvalidRequest(f"{field} holds ids outside the vocabulary (0 to {size - 1})", param=field)
    return tokens
