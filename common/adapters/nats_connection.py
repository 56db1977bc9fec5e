"""A connection to NATS that never gives up, and the subscriptions that live as long as it does.

nats-py reconnects by itself after a lost connection. Three things are added here:

- On some errors from the server (a violated limit, an expired account) nats-py closes for ever. Then a new client is
  made, and every subscription with it.
- A `tls://` URL is taken at its word: nats-py would go on in plain text where the server does not ask for TLS.
- A message goes to its handler where it is read. nats-py's way, a queue and a task for each subscription, costs more CPU than
  reading it, and delays whoever shares the loop.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NativeSubscription

from common.adapters.nats_identity import checked_identity
from common.adapters.server_urls import Credentials, parse_server_url, redacted_list, take_credentials
from common.adapters.tls_context import client_context
from common.values.errors import BrokerUnavailable
from common.values.server_access import NatsIdentity, TlsFiles

RECONNECT_WAIT_S = 0.2
SERVER_PING_INTERVAL_S = 5
CLOSE_TIMEOUT_S = 2.0
MAX_REASONS = 8
TURN_BYTES = 16 << 10
"""Of messages handled in one go: whoever shares the loop (a write to the store, a client's request) gets its turn after that."""

logger = logging.getLogger(__name__)


Handle = Callable[[str, bytes, str, str | None], None]
"""(subject, payload, reply subject, status of a message of the server's own)."""


class _Client(Client):
    _handled_bytes = 0

    def _connect_command(self) -> bytes:
        """No CONNECT, which holds the password, in plain text to a server that was named by a `tls://` URL."""
        server = self._current_server
        if server is not None and server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise errors.SecureConnWantedError
        return super()._connect_command()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> None:
        native = self._subs.get(sid)
        ours = None if native is None or headers else getattr(native._cb, "__self__", None)
        if isinstance(ours, NatsSubscription):
            ours.take(subject.decode(), data, reply.decode())
            self._handled_bytes += len(data)
            if self._handled_bytes > TURN_BYTES:
                self._handled_bytes = 0
                await asyncio.sleep(0)
        else:
            await super()._process_msg(sid, subject, reply, data, headers)


class NatsSubscription:
    """One subscription: it moves to the next client when the one it has is gone.

    The handler never awaits and never raises. Messages with headers, which only the server sends here, come by nats-py's own
    queue, on which no limit is set.
    """

    def __init__(self, connection: "NatsConnection", subject: str, handle: Handle) -> None:
        self.subject = subject
        self._connection = connection
        self._handle = handle
        self._client: Client | None = None
        self._native: NativeSubscription | None = None
        self._closed = False

    async def attach(self, client: Client) -> None:
        if self._client is client:
            return
        self._client = client
        native = await client.subscribe(self.subject, cb=self._deliver, pending_msgs_limit=-1, pending_bytes_limit=-1)
        if self._closed:
            await native.unsubscribe()
        else:
            self._native = native

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._connection.forget(self)
        if self._native is not None:
            with suppress(errors.Error):  # the connection, or the subscription with it, is gone already
                await self._native.unsubscribe()

    def take(self, subject: str, payload: bytes, reply: str, status: str | None = None) -> None:
        if not self._closed:
            self._handle(subject, payload, reply, status)

    async def _deliver(self, message: Msg) -> None:
        self.take(message.subject, message.data, message.reply, (message.headers or {}).get("Status"))


class NatsConnection:
    """`online` is set while messages can pass. `on_state` is told each change, until `close`."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        name: str,
        tls: TlsFiles,
        identity: NatsIdentity,
        on_state: Callable[[bool], None],
        counts: Counter[str],
    ) -> None:
        parsed = [take_credentials(parse_server_url(url, schemes=("nats", "tls"), default_port=4222)) for url in urls]
        self._urls = [url for url, _ in parsed]
        self._credentials = next((found for _, found in parsed if found != Credentials()), Credentials())
        self._name = name
        self._tls = client_context(tls)
        self._identity = checked_identity(identity)
        self._on_state = on_state
        self._counts = counts
        self._subscriptions: list[NatsSubscription] = []
        self._ended_by_server = asyncio.Event()
        self._closing = False
        self._reasons: list[str] = []
        self.shown_urls = redacted_list(urls)
        self.client: Client = _Client()
        self.online = asyncio.Event()

    def add(self, subject: str, handle: Handle) -> NatsSubscription:
        """A subscription that every further client gets; `attach` it to the present one."""
        subscription = NatsSubscription(self, subject, handle)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, subscription: NatsSubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    async def open(self, timeout_s: float) -> None:
        """A new client with all subscriptions. nats-py tries the servers in turn until the time is over."""
        client = _Client()
        self._ended_by_server.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect(client, timeout_s)
                self.client = client
                for subscription in list(self._subscriptions):
                    await subscription.attach(client)
        except (TimeoutError, errors.Error, OSError) as error:
            await self._discard(client)
            reasons = "; ".join(self._reasons) or str(error) or "no answer"
            hint = "start nats-server there, or correct the URL and its credentials"
            raise BrokerUnavailable(f"cannot use NATS at {self.shown_urls} within {timeout_s:g} s ({reasons}): {hint}") from error
        self._set_online(client.is_connected)

    async def keep_open(self, timeout_s: float) -> None:
        """Replaces a client that has given up for good, until the new one works. Runs until it is cancelled."""
        while True:
            await self._ended_by_server.wait()
            await self._discard(self.client)
            try:
                await self.open(timeout_s)
            except BrokerUnavailable as error:
                logger.warning("broker_unavailable", extra={"fields": {"reason": str(error)}})
                self._ended_by_server.set()
                await asyncio.sleep(RECONNECT_WAIT_S)

    def lost(self, error: Exception) -> None:
        """A writer noticed before the client's own callbacks told it."""
        self._note_error(error)
        self._set_online(False)
        if self.client.is_closed:
            self._ended_by_server.set()

    async def close(self) -> None:
        self._closing = True
        self.online.clear()
        for subscription in list(self._subscriptions):
            await subscription.close()
        await self._discard(self.client)

    async def _connect(self, client: Client, timeout_s: float) -> None:
        async def on_disconnected() -> None:
            if self.client is client:
                self._set_online(False)

        async def on_reconnected() -> None:
            if self.client is client:
                self._set_online(True)

        async def on_closed() -> None:
            if self.client is client and not self._closing:
                self._set_online(False)
                self._ended_by_server.set()

        async def on_error(error: Exception) -> None:
            self._note_error(error)

        await client.connect(
            servers=list(self._urls),
            name=self._name,
            error_cb=on_error,
            disconnected_cb=on_disconnected,
            reconnected_cb=on_reconnected,
            closed_cb=on_closed,
            connect_timeout=min(2.0, timeout_s),  # type: ignore[arg-type]  # seconds; fractions work
            reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]
            max_reconnect_attempts=-1,
            ping_interval=SERVER_PING_INTERVAL_S,
            user=self._credentials.user,
            password=self._credentials.password,
            token=self._credentials.token,
            tls=self._tls,
            user_credentials=self._identity.creds_file,
            nkeys_seed=self._identity.nkey_file,
        )

    async def _discard(self, client: Client) -> None:
        """Nothing that goes wrong with a client that is thrown away matters to its successor; it is counted."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await client.close()
        except (TimeoutError, errors.Error, OSError, AssertionError) as error:
            self._note_error(error)

    def _set_online(self, online: bool) -> None:
        if online == self.online.is_set() or self._closing:
            return
        if online:
            self.online.set()
            self._counts["connections"] += 1
            self._reasons.clear()
            logger.info("broker_connected", extra={"fields": {"servers": self.shown_urls}})
        else:
            self.online.clear()
            logger.warning("broker_lost", extra={"fields": {"servers": self.shown_urls, "reason": "; ".join(self._reasons)}})
        self._on_state(online)

    def _note_error(self, error: Exception) -> None:
        """Counted each time, logged once until the connection works again: a server that is away fails five times a second."""
        self._counts["errors"] += 1
        reason = str(error) or type(error).__name__
        if reason not in self._reasons and len(self._reasons) < MAX_REASONS:
            self._reasons.append(reason)
            logger.info("broker_error", extra={"fields": {"servers": self.shown_urls, "reason": reason}})
