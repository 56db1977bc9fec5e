"""A member of a mesh that was built from another release: every byte that leaves it has that release's version, and fields that
ours does not know, at the top and in each entry."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from common.ports.broker import Broker, Message, Subscription
from common.ports.peers import PeerConnection, PeerNetwork


def as_of(payload: bytes, version: int) -> bytes:
    value = msgspec.msgpack.decode(payload)
    if not isinstance(value, dict) or "v" not in value:
        return payload
    for part in value.values():
        if isinstance(part, list):
            for entry in part:
                if isinstance(entry, dict):
                    entry["of_another_release"] = [1.5, None]
    return msgspec.msgpack.encode(value | {"v": version, "of_another_release": {"a": b"b"}})


@dataclass(frozen=True)
class _Answered:
    """A message whose answer is of the other release."""

    message: Message
    version: int

    @property
    def subject(self) -> str:
        return self.message.subject

    @property
    def payload(self) -> bytes:
        return self.message.payload

    def respond(self, payload: bytes) -> None:
        self.message.respond(as_of(payload, self.version))


@dataclass(frozen=True)
class OtherReleaseBroker:
    broker: Broker
    version: int

    @property
    def connected(self) -> bool:
        return self.broker.connected

    @property
    def max_payload_bytes(self) -> int:
        return self.broker.max_payload_bytes

    def publish(self, subject: str, payload: bytes) -> None:
        self.broker.publish(subject, as_of(payload, self.version))

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes | None:
        return await self.broker.request(subject, as_of(payload, self.version), timeout_s=timeout_s)

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> Subscription:
        return await self.broker.subscribe(subject, lambda message: handler(_Answered(message, self.version)))

    async def ping(self, *, timeout_s: float) -> bool:
        return await self.broker.ping(timeout_s=timeout_s)

    async def close(self) -> None:
        await self.broker.close()


@dataclass(frozen=True)
class _Connection:
    connection: PeerConnection
    version: int

    @property
    def address(self) -> str:
        return self.connection.address

    def send(self, payload: bytes) -> None:
        self.connection.send(as_of(payload, self.version))

    def listen(self, on_message: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self.connection.listen(on_message, on_lost)

    async def close(self) -> None:
        await self.connection.close()


@dataclass(frozen=True)
class OtherReleasePeers:
    network: PeerNetwork
    version: int

    async def listen(self, on_connection: Callable[[PeerConnection], None]) -> tuple[str, int]:
        return await self.network.listen(lambda connection: on_connection(_Connection(connection, self.version)))

    async def dial(self, host: str, port: int, *, timeout_s: float) -> PeerConnection:
        return _Connection(await self.network.dial(host, port, timeout_s=timeout_s), self.version)

    async def close(self) -> None:
        await self.network.close()
