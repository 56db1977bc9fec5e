"""Every subject on the broker and every key in the store, with the message type that travels there.

| subject | type | from → to |
| --- | --- | --- |
| `segue.v1.<mesh>.worker.<id>.inbox` | `InboxMessage` (answered `DispatchReply` for a dispatch) | gateway → worker |
| `segue.v1.<mesh>.worker.<id>.replay` | `ReplayRequest` → `ReplayReply` | gateway → worker |
| `segue.v1.<mesh>.gateway.<id>.tokens` | `TokenFrame` | worker → gateway |
| `segue.v1.<mesh>.gateway.<id>.beat` | `GatewayBeat` | gateway → workers |
| `segue.v1.<mesh>.gateway.<id>.load` | `GatewayLoad` | gateway → planners |
| `segue.v1.<mesh>.decision.<id>` | `Decision` | planner → all |
| `segue.v1.<mesh>.snapshot.<id>` | `WorkerSnapshot` (in a `Snapshot`) | worker → all |

| key | what | lives |
| --- | --- | --- |
| `segue:v1:<mesh>:request:<id>` | the request record | while it runs, then 10 minutes |
| `segue:v1:<mesh>:idempotency:<digest>` | the request of an Idempotency-Key | as its request |
| `segue:v1:<mesh>:gateway:<id>` | a gateway's mark: where it is missing, the store was emptied | 60 s, renewed by the gateway |
| `segue:v1:<mesh>:tokens:<id>` | a request's token log: a list of `LogEntry` | as the record |
| `segue:v1:<mesh>:model:<name>:<revision>` | the model card | 60 s, renewed by its workers |
| `segue:v1:<mesh>:planner` | which planner acts | 5 s, renewed by it |
| `segue:v1:<mesh>:dtype:<name>:<revision>` | the dtype in which all workers of the model compute | 60 s, renewed by its workers |
"""

from dataclasses import dataclass

from common.values.ids import GatewayId, ModelKey, RequestId, WorkerId


@dataclass(frozen=True, slots=True)
class Names:
    """All names of one mesh. Ids never hold a dot, a star, a blank or a `>`."""

    mesh: str

    def worker_inbox(self, worker: WorkerId) -> str:
        return f"segue.v1.{self.mesh}.worker.{worker}.inbox"

    def worker_replay(self, worker: WorkerId) -> str:
        return f"segue.v1.{self.mesh}.worker.{worker}.replay"

    def gateway_tokens(self, gateway: GatewayId) -> str:
        return f"segue.v1.{self.mesh}.gateway.{gateway}.tokens"

    def gateway_beat(self, gateway: GatewayId) -> str:
        return f"segue.v1.{self.mesh}.gateway.{gateway}.beat"

    @property
    def all_gateway_beats(self) -> str:
        return f"segue.v1.{self.mesh}.gateway.*.beat"

    def gateway_load(self, gateway: GatewayId) -> str:
        return f"segue.v1.{self.mesh}.gateway.{gateway}.load"

    @property
    def all_gateway_loads(self) -> str:
        return f"segue.v1.{self.mesh}.gateway.*.load"

    def decision(self, planner: str) -> str:
        return f"segue.v1.{self.mesh}.decision.{planner}"

    @property
    def planner_key(self) -> str:
        return f"segue:v1:{self.mesh}:planner"

    def snapshot(self, worker: WorkerId) -> str:
        return f"segue.v1.{self.mesh}.snapshot.{worker}"

    @property
    def all_snapshots(self) -> str:
        return f"segue.v1.{self.mesh}.snapshot.*"

    def request_key(self, request: RequestId) -> str:
        return f"segue:v1:{self.mesh}:request:{request}"

    def log_key(self, request: RequestId) -> str:
        return f"segue:v1:{self.mesh}:tokens:{request}"

    def idempotency_key(self, digest: str) -> str:
        """`digest` is of the tenant and the client's key together."""
        return f"segue:v1:{self.mesh}:idempotency:{digest}"

    def gateway_key(self, gateway: GatewayId) -> str:
        return f"segue:v1:{self.mesh}:gateway:{gateway}"

    def model_key(self, model: ModelKey) -> str:
        return f"segue:v1:{self.mesh}:model:{model.name}:{model.revision}"

    def dtype_key(self, model: ModelKey) -> str:
        return f"segue:v1:{self.mesh}:dtype:{model.name}:{model.revision}"
