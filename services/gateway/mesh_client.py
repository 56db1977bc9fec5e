"""The mesh as the gateway's HTTP side sees it: what can be asked of it, over the shell that runs the pure core."""

import asyncio
from collections.abc import Callable, Sequence

from common.mesh.gateway import GatewayCore
from common.policy.routing import PlacementRules
from common.ports.broker import Broker
from common.ports.generation import Attached, GenerationRequest, RequestTimeline
from common.ports.state_store import StateStore
from common.protocol.request_record import IdempotencyMark
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.message_refusals import MessageRefusals
from common.values.errors import (
    ContextTooLong,
    IdempotencyKeyReused,
    InvalidRequest,
    StreamNotFound,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, RequestId
from common.values.model_card import ModelCard
from common.values.request_account import RequestAccount
from common.values.slo import Slo
from services.gateway.attaching import Attaching
from services.gateway.live_generation import LiveGeneration, OwnedRequest
from services.gateway.mesh_shell import MeshShell

MAX_PROMPT_SCORES = 20_000
"""Prompt log-probabilities travel in one frame: (positions x alternatives) is bounded."""


class LiveMesh:
    """A MeshClient. `run` serves until it is cancelled; requests can be started from then on."""

    def __init__(
        self,
        *,
        gateway: GatewayId,
        incarnation: Incarnation,
        broker: Broker,
        store: StateStore,
        names: Names,
        failpoints: Failpoints | None = None,
        slo: Slo | None = None,
        rules: PlacementRules | None = None,
    ) -> None:
        self._shell = MeshShell(
            gateway=gateway,
            incarnation=incarnation,
            broker=broker,
            store=store,
            names=names,
            failpoints=failpoints or Failpoints(),
            slo=slo or Slo(),
            rules=rules or PlacementRules(),
        )
        self._broker = broker
        self._attaching = Attaching(self._shell)

    @property
    def core(self) -> GatewayCore:
        return self._shell.core

    @property
    def refusals(self) -> MessageRefusals:
        return self._shell.refusals

    def count_accounts(self, count: Callable[[RequestAccount], None]) -> None:
        """What every request was promised and got, as it ends."""
        self._shell.on_account = count

    async def run(self, started: asyncio.Event) -> None:
        await self._shell.run(started)

    async def first_cards(self, *, timeout_s: float) -> None:
        await self._shell.models.first(timeout_s=timeout_s)

    # ------------------------------------------------------------------ MeshClient

    def cards(self) -> Sequence[ModelCard]:
        return self._shell.models.cards()

    def card(self, name: str) -> ModelCard:
        return self._shell.models.card(name)

    def readiness(self) -> dict[str, str]:
        problems: dict[str, str] = {}
        if not self._broker.connected:
            problems["broker"] = "not connected"
        if not self.cards():
            problems["workers"] = "no worker is ready"
        for snapshot in self._shell.core.registry.all():
            if snapshot.unpaired and not snapshot.peers and snapshot.role != "both":
                fields = ", ".join(f"{peer}: {field}" for peer, field in sorted(snapshot.unpaired.items()))
                problems[f"worker {snapshot.worker}"] = f"can pair with nobody ({fields})"
        return problems

    async def start(self, request: GenerationRequest) -> LiveGeneration:
        card = self.card(request.model)
        _check(request, card)
        now = self._shell.now()
        self._shell.admission.check(broker_connected=self._broker.connected, now=now)
        if not self._shell.is_running:
            raise Unavailable("the gateway is stopping")
        owned = OwnedRequest(request, card.model, cancel_in_mesh=self._shell.cancel, clock=self._shell.now)
        generation = owned.read()
        self._shell.core.start(
            request_id=request.request_id,
            model=card.model,
            prompt=request.prompt,
            sampling=request.sampling,
            choices=request.choices,
            salt=request.salt,
            deadline=None if request.deadline_s is None else now + request.deadline_s,
            now=now,
            wanted=request.wanted,
        )
        self._shell.add(owned)
        try:
            await asyncio.shield(owned.accepted)
        except BaseException:
            generation.cancel()
            await generation.close()
            raise
        return generation

    async def attach(self, request_id: RequestId, tenant: str) -> Attached:
        return await self._attaching.attach(request_id, tenant)

    async def timeline(self, request_id: RequestId, tenant: str) -> RequestTimeline:
        record = await self._shell.records.find(request_id)
        if record is None or record.facts.tenant != tenant:
            raise StreamNotFound("there is no such request; what has ended is kept for ten minutes")
        return RequestTimeline(
            state=record.state,
            attempt=record.attempt,
            worker=record.worker,
            decode_worker=record.decode_worker,
            seconds=record.seconds,
            account=record.account,
        )

    async def claim(self, mark: IdempotencyMark, request_id: RequestId) -> RequestId:
        holder, digest = await self._shell.records.claim(mark, request_id)
        if digest != mark.digest:
            raise IdempotencyKeyReused("this Idempotency-Key came with another body before; use a new key for a new request")
        return holder

    async def release(self, mark: IdempotencyMark, request_id: RequestId) -> None:
        await self._shell.records.release(mark, request_id)


def _check(request: GenerationRequest, card: ModelCard) -> None:
    length = len(request.prompt)
    if length >= card.max_model_len:
        raise ContextTooLong(f"the prompt has {length} tokens; {card.model.name} takes at most {card.max_model_len - 1}")
    asked = request.sampling.prompt_logprobs
    if asked is not None and length * (asked + 1) > MAX_PROMPT_SCORES:
        message = f"prompt_logprobs times prompt tokens must stay below {MAX_PROMPT_SCORES}: ask for fewer, or a shorter prompt"
        raise InvalidRequest(message, param="prompt_logprobs")
