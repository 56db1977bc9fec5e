"""`GET /v1/requests/{id}`: where an ended request's time went, for whoever asked for it; by its `x-segue-request-id`."""

import msgspec

from common.ports.generation import MeshClient
from common.values.ids import RequestId
from common.values.request_account import RequestAccount
from services.gateway.http.api_keys import ApiKeys
from services.gateway.http.asgi import Receive, Scope, Send, header, send_json

REQUEST_PREFIX = "/v1/requests/"


class TimelineAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds`: moments since the request was accepted; empty while it runs. `account`: its objectives, where it was placed, what was
    predicted and what it had."""

    id: str
    object: str = "request.timeline"
    state: str
    attempt: int
    worker: str | None
    decode_worker: str | None
    seconds: dict[str, float]
    account: RequestAccount | None = None


class TimelineRoute:
    def __init__(self, mesh: MeshClient, keys: ApiKeys) -> None:
        self._mesh = mesh
        self._keys = keys

    async def show(self, scope: Scope, receive: Receive, send: Send) -> int:
        tenant = self._keys.check(header(scope, b"authorization"))
        request_id = RequestId(scope["path"].removeprefix(REQUEST_PREFIX).rstrip("/"))
        timeline = await self._mesh.timeline(request_id, tenant)
        answer = TimelineAnswer(
            id=request_id,
            state=timeline.state,
            attempt=timeline.attempt,
            worker=timeline.worker,
            decode_worker=timeline.decode_worker,
            seconds=dict(timeline.seconds),
            account=timeline.account,
        )
        await send_json(send, msgspec.json.encode(answer))
        return 200
