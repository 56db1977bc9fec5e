"""Can it be reached: the gateway's port before the start, brokers named by URL, and the finished mesh."""

import asyncio
import contextlib
import socket

from common.protocol.subjects import Names
from common.runtime.dtype_agreement import DtypeAgreement
from common.runtime.settings import MeshSettings
from common.values.errors import SettingsError
from common.values.ids import ModelKey
from common.values.kv_layout import KvDtype

BACKLOG = 1024
ASK_AGAIN_S = 0.1
ANSWER_TIMEOUT_S = 5.0


def listen_for_gateway(host: str, port: int) -> socket.socket:
    """The listening socket that the supervisor holds and gateways inherit: connections wait in it while one restarts."""
    bare = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise SettingsError(f"--host {host}: is no address of this machine ({error.strerror or error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise SettingsError(f"--port {port}: only root may listen below 1024; give another --port") from None
        raise SettingsError(
            f"port {port} on {host} cannot be used ({error.strerror}): stop what listens there, or give another --port (0: any)"
        ) from None
    return listener


async def check_brokers(mesh: MeshSettings, *, nats: bool, redis: bool) -> None:
    """Raises BrokerUnavailable, StoreUnavailable or SettingsError for a given server that does not answer as it should."""
    from common.runtime.broker_connections import connect_broker, connect_store

    if nats:
        broker = await connect_broker(mesh, name="segue-serve")
        await broker.close()
    if redis:
        store = await connect_store(mesh, timeout_s=ANSWER_TIMEOUT_S)
        await store.close()


async def mesh_dtype(mesh: MeshSettings, model: ModelKey) -> KvDtype | None:
    """The dtype that running workers of the model have settled on."""
    from common.runtime.broker_connections import connect_store

    store = await connect_store(mesh, timeout_s=ANSWER_TIMEOUT_S)
    try:
        return await DtypeAgreement(store, Names(mesh.name).dtype_key(model)).fixed()
    finally:
        await store.close()


async def until_ready(host: str, port: int) -> None:
    """Ask /readyz until it says 200: from outside there is no event to wait for, so this asks again after a short while."""
    while True:
        if await _is_ready(host, port):
            return
        await asyncio.sleep(ASK_AGAIN_S)


async def _is_ready(host: str, port: int) -> bool:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(reachable_host(host), port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.close()
    return False


def reachable_host(host: str) -> str:
    """An address to connect to, for one to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
