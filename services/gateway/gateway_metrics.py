"""What the gateway observes of every request: TTFT, ITL and E2E are observed here and nowhere else."""

from typing import Literal

from common.runtime.metrics import Metrics

Outcome = Literal["finished", "cancelled", "failed", "rejected"]


class GatewayMetrics:
    """Times start when the request's body has arrived. Model names are those of served models, so labels stay few."""

    def __init__(self, metrics: Metrics) -> None:
        model = ("model",)
        self.responses = metrics.counter("segue_http_responses_total", "HTTP answers by route and status.", ("route", "status"))
        self.requests = metrics.counter(
            "segue_requests_total",
            "Generation requests by end: finished, cancelled (client left), failed (after admission), rejected (not admitted).",
            ("model", "kind", "outcome"),
        )
        self.ttft = metrics.histogram("segue_time_to_first_token_seconds", "From body read to first token.", model)
        self.itl = metrics.histogram("segue_inter_token_latency_seconds", "Between two arrivals of tokens of one choice.", model)
        self.e2e = metrics.histogram("segue_request_duration_seconds", "From body read to last token, finished requests.", model)
        self.prompt_tokens = metrics.counter("segue_prompt_tokens_total", "Prompt tokens of admitted requests.", model)
        self.completion_tokens = metrics.counter("segue_completion_tokens_total", "Tokens delivered to clients.", model)
        self.running = metrics.gauge("segue_requests_running", "Generation requests between admission and end.").series()
        self.attached = metrics.counter(
            "segue_streams_attached_total", "Clients that came back to a request: resumed, or repeated (Idempotency-Key).", ("how",)
        )
        self.websockets = metrics.gauge("segue_websocket_connections", "Open websocket connections.").series()


class RequestObserver:
    """Stamps one request. `now` is a monotonic clock's."""

    def __init__(self, metrics: GatewayMetrics, *, model: str, kind: str, arrived: float, choices: int) -> None:
        self._metrics = metrics
        self._model = model
        self._kind = kind
        self._arrived = arrived
        self._itl = metrics.itl.series(model)
        self._tokens = metrics.completion_tokens.series(model)
        self._last: list[float | None] = [None] * choices
        self._begun = False

    def admitted(self, prompt_tokens: int) -> None:
        self._metrics.prompt_tokens.series(self._model).add(prompt_tokens)
        self._metrics.running.add(1)

    def token(self, choice: int, now: float) -> None:
        last = self._last[choice]
        if last is not None:
            self._itl.observe(now - last)
        elif not self._begun:
            self._begun = True
            self._metrics.ttft.series(self._model).observe(now - self._arrived)
        self._last[choice] = now
        self._tokens.add()

    def released(self) -> None:
        self._metrics.running.add(-1)

    def ended(self, outcome: Outcome, now: float) -> None:
        self._metrics.requests.series(self._model, self._kind, outcome).add()
        if outcome == "finished":
            self._metrics.e2e.series(self._model).observe(now - self._arrived)
