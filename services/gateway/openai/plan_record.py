"""A plan as the request record keeps it: enough to give the same answer again, at another gateway or once it has ended.

The prompt's ids lie beside it while the request runs. Of an ended one only the last few are left, which the detokeniser needs.
"""

from collections.abc import Sequence

import msgspec

from common.ports.generation import GenerationRequest
from common.values.errors import PeerError
from common.values.ids import RequestId
from services.gateway.openai.plan import Asker, Kind, RequestPlan
from services.gateway.text.detokenizer import CONTEXT_TOKENS
from services.gateway.text.text_model import TextModel


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Of one prompt of a plan: `prompts` is how many the plan has, `tail` and `prompt_tokens` are this one's."""

    id: str
    kind: Kind
    created: int
    prompts: int
    prompt_tokens: int
    tail: list[int]
    n: int
    stops: list[str]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool


_decoder = msgspec.msgpack.Decoder(PlanRecord)


def mesh_requests(plan: RequestPlan) -> list[GenerationRequest]:
    """What the mesh is asked for: each prompt is a request of its own, the first one under the plan's id."""
    asker = plan.asker
    return [
        GenerationRequest(
            request_id=part_id(plan.id, place),
            model=plan.model,
            prompt=prompt,
            sampling=plan.sampling,
            choices=plan.n,
            body=msgspec.msgpack.encode(_record(plan, place)),
            salt=plan.salt,
            deadline_s=plan.deadline_s,
            tenant=asker.tenant,
            lingers=asker.lingers,
            keep_prompt=plan.echoes is not None or plan.prompt_logprobs is not None,
            idempotency=asker.idempotency if place == 0 else None,
            wanted=asker.wanted,
        )
        for place, prompt in enumerate(plan.prompts)
    ]


def part_id(plan_id: str, place: int) -> RequestId:
    return RequestId(f"{plan_id}-{place}" if place else plan_id)


def read_plan(request: GenerationRequest) -> PlanRecord:
    """Raises PeerError."""
    try:
        return _decoder.decode(request.body)
    except (msgspec.DecodeError, ValueError) as error:
        raise PeerError(f"malformed plan in a request record: {error}") from error


def restored_plan(requests: Sequence[GenerationRequest], text_model: TextModel) -> RequestPlan:
    """The plan that `mesh_requests` turned into these. Raises PeerError."""
    records = [read_plan(request) for request in requests]
    first = records[0]
    prompts = tuple(request.prompt or tuple(record.tail) for request, record in zip(requests, records, strict=True))
    skip = first.skip_special_tokens
    return RequestPlan(
        id=first.id,
        kind=first.kind,
        created=first.created,
        text_model=text_model,
        prompts=prompts,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        sampling=requests[0].sampling,
        n=first.n,
        stops=tuple(first.stops),
        include_stop=first.include_stop,
        skip_special_tokens=skip,
        stream=first.stream,
        include_usage=first.include_usage,
        logprobs=first.logprobs,
        prompt_logprobs=first.prompt_logprobs,
        echoes=tuple(text_model.decode(prompt, skip_special_tokens=skip) for prompt in prompts) if first.echo else None,
        salt=requests[0].salt,
        deadline_s=requests[0].deadline_s,
        asker=Asker(tenant=requests[0].tenant, lingers=True),
    )


def _record(plan: RequestPlan, place: int) -> PlanRecord:
    prompt = plan.prompts[place]
    return PlanRecord(
        id=plan.id,
        kind=plan.kind,
        created=plan.created,
        prompts=len(plan.prompts),
        prompt_tokens=len(prompt),
        tail=list(prompt[-CONTEXT_TOKENS:]),
        n=plan.n,
        stops=list(plan.stops),
        include_stop=plan.include_stop,
        skip_special_tokens=plan.skip_special_tokens,
        stream=plan.stream,
        include_usage=plan.include_usage,
        logprobs=plan.logprobs,
        prompt_logprobs=plan.prompt_logprobs,
        echo=plan.echoes is not None,
    )
