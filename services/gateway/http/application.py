"""The gateway as an ASGI application: routes, keys, errors.

Plain ASGI: the streams are too hot for a framework, and the few other routes do not need one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from common.ports.generation import MeshClient
from common.runtime.metrics import CONTENT_TYPE, Metrics
from common.values.errors import SegueError
from services.gateway.client_requests import ClientRequests
from services.gateway.gateway_metrics import GatewayMetrics
from services.gateway.http.api_keys import ApiKeys
from services.gateway.http.asgi import ClientGone, Receive, Scope, Send, header, send_error, send_json, send_whole
from services.gateway.http.generation_routes import STREAM_PREFIX, GenerationRoutes
from services.gateway.http.http_errors import MethodNotAllowed, RouteNotFound, Stopping, answerable
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.request_slots import RequestSlots
from services.gateway.http.speed_wishes import SpeedWishes
from services.gateway.http.timeline_route import REQUEST_PREFIX, TimelineRoute
from services.gateway.openai.model_list import model_entry, model_list
from services.gateway.openai.planner import Planner
from services.gateway.text.text_thread import TextThread
from services.gateway.websocket.connection import WebSocketConnection

_log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
OPEN_ROUTES = frozenset({"/health", "/readyz"})
MODEL_PREFIX = "/v1/models/"
WEBSOCKET_PATH = "/v1/stream"

Handler = Callable[[Scope, Receive, Send], Awaitable[int]]


class GatewayApplication:
    """`stopping` set means: no new work; websockets close once their requests have ended. `close` when nothing runs any more."""

    def __init__(self, mesh: MeshClient, settings: HttpSettings, metrics: Metrics) -> None:
        self._mesh = mesh
        self._settings = settings
        self._exposition = metrics.exposition
        self._metrics = GatewayMetrics(metrics)
        self._keys = ApiKeys(settings.api_keys)
        self._slots = RequestSlots(settings.max_concurrent_requests)
        self._thread = TextThread()
        self._planner = Planner(mesh, self._thread, deadline_s=settings.request_deadline_s)
        self.stopping = asyncio.Event()
        self._requests = ClientRequests(mesh, self._planner, self._metrics)
        self._wishes = SpeedWishes(settings.classes, self._keys)
        generation = GenerationRoutes(self._requests, self._planner, self._slots, self._keys, self._wishes, settings)
        timeline = TimelineRoute(mesh, self._keys)
        self._prefixes: dict[str, Handler] = {
            MODEL_PREFIX: self._model,
            STREAM_PREFIX: generation.resume,
            REQUEST_PREFIX: timeline.show,
        }
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": generation.chat},
            "/v1/completions": {"POST": generation.completion},
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._health},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._show_metrics},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case other:
                raise ValueError(f"ASGI scope {other} is not served")

    def close(self) -> None:
        self._thread.close()

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") or "/"
        prefix = next((prefix for prefix in self._prefixes if path.startswith(prefix)), None)
        route = path if path in self._routes else f"{prefix}{{id}}" if prefix else "other"
        status = CLIENT_CLOSED_REQUEST
        try:
            status = await self._handler(scope, path)(scope, receive, send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if not self.stopping.is_set():
                raise
            status = await send_error(send, Stopping("the gateway stops"))
        except Exception as error:
            status = await self._answer_error(answerable(error, _log), send)
        finally:
            self._metrics.responses.series(route, str(status)).add()

    async def _answer_error(self, error: SegueError, send: Send) -> int:
        if isinstance(error, MethodNotAllowed):
            return await send_error(send, error, headers=[(b"allow", error.allowed.encode())])
        return await send_error(send, error)

    def _handler(self, scope: Scope, path: str) -> Handler:
        if path not in OPEN_ROUTES:
            self._keys.check(header(scope, b"authorization"))
        found = next((handler for prefix, handler in self._prefixes.items() if path.startswith(prefix)), None)
        methods = {"GET": found} if found is not None else self._routes.get(path)
        if methods is None:
            raise RouteNotFound(f"there is no {path} here")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in methods:
            allowed = ", ".join(methods)
            raise MethodNotAllowed(f"{path} takes {allowed}, not {scope['method']}", allowed=allowed)
        return methods[method]

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> int:
        await send_json(send, b'{"status":"ok"}')
        return 200

    async def _readyz(self, scope: Scope, receive: Receive, send: Send) -> int:
        """The status only: anyone may ask, so it does not say what is wrong."""
        ready = not self._mesh.readiness() and not self.stopping.is_set()
        status = 200 if ready else 503
        await send_json(send, b'{"status":"ready"}' if ready else b'{"status":"not_ready"}', status=status)
        return status

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> int:
        await send_json(send, msgspec.json.encode(model_list(self._mesh.cards())))
        return 200

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> int:
        card = self._mesh.card(scope["path"].removeprefix(MODEL_PREFIX).rstrip("/"))
        await send_json(send, msgspec.json.encode(model_entry(card)))
        return 200

    async def _show_metrics(self, scope: Scope, receive: Receive, send: Send) -> int:
        await send_whole(send, self._exposition().encode(), content_type=CONTENT_TYPE.encode())
        return 200

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].rstrip("/") != WEBSOCKET_PATH:
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        connection = WebSocketConnection(
            scope,
            receive,
            send,
            requests=self._requests,
            planner=self._planner,
            slots=self._slots,
            metrics=self._metrics,
            keys=self._keys,
            wishes=self._wishes,
            settings=self._settings,
            stopping=self.stopping,
        )
        await connection.run()


def build_application(mesh: MeshClient, settings: HttpSettings, metrics: Metrics) -> GatewayApplication:
    """The gateway's HTTP side on top of a mesh. Serve it with `serve_http`, or any ASGI server."""
    return GatewayApplication(mesh, settings, metrics)
