"""uvicorn within our own event loop: no signal handlers, no polling, a bounded drain."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from common.runtime.one_error import one_error
from common.values.errors import SettingsError
from services.gateway.http.application import GatewayApplication
from services.gateway.http.bounded_protocol import BoundedHttpProtocol, BoundedWebSocketProtocol
from services.gateway.http.http_settings import HttpSettings

LAST_WORDS_S = 2.0


class _Server(uvicorn.Server):
    """Serves until `stop` is set; uvicorn's own loop would wake ten times a second to look."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event) -> None:
        super().__init__(config)
        self._stop = stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._stop.wait()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises SettingsError where the port is taken or the host is not ours."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port") from error


async def serve_http(
    app: GatewayApplication, settings: HttpSettings, *, sockets: list[socket.socket] | None = None, stop: asyncio.Event
) -> None:
    """Serve until `stop` is set, then drain: no new connections, running requests finish within `drain_timeout_s`, what is
    left ends with an error event. `sockets` are listening ones (a supervisor's), closed here."""
    listening = sockets if sockets is not None else [listen(settings.host, settings.port)]
    server = _Server(_config(app, settings), stop)
    try:
        with one_error():
            async with asyncio.TaskGroup() as group:
                follower = group.create_task(_follow(stop, app))
                await server.serve(sockets=listening)
                follower.cancel()
    finally:
        app.stopping.set()
        await _end_all(server)
        app.close()


async def _follow(stop: asyncio.Event, app: GatewayApplication) -> None:
    await stop.wait()
    app.stopping.set()


async def _end_all(server: _Server) -> None:
    """Requests that outlived the drain were cancelled: let them say so, then cut what remains. A cancelled `serve_http`
    comes here with listeners open and requests running."""
    for listener in getattr(server, "servers", ()):
        listener.close()
    tasks = set(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=LAST_WORDS_S)
    for connection in list(server.server_state.connections):
        connection.transport.abort()


def _config(app: GatewayApplication, settings: HttpSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=partial(BoundedHttpProtocol, settings=settings),  # type: ignore[arg-type]
        ws=partial(BoundedWebSocketProtocol, settings=settings),  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(settings.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        ws_max_size=settings.max_body_bytes,
        ws_ping_interval=settings.websocket_ping_s,
        ws_ping_timeout=settings.websocket_ping_s,
        ws_per_message_deflate=False,
    )
