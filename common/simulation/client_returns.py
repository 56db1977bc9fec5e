"""What clients do when they lose their gateway, or it falls silent: they come back, at any gateway, until one serves them."""

from collections.abc import Mapping
from functools import partial

from common.simulation.simulated_client import SimulatedClient
from common.simulation.simulated_gateway import SimulatedGateway
from common.simulation.surroundings import Surroundings
from common.values.errors import SegueError, Unavailable
from common.values.ids import GatewayId

PATIENCE_S = 25.0
"""A request without a reader lives for 30 s."""


class ClientReturns:
    def __init__(self, around: Surroundings, gateways: Mapping[GatewayId, SimulatedGateway]) -> None:
        self._around = around
        self._gateways = gateways

    def lost_connection(self, client: SimulatedClient) -> None:
        random = self._around.random
        if random.random() < self._around.strength.abandonment:
            self._around.note(client.request_id, "never comes back")
            self._around.counts["abandoned"] += 1
            client.cut = True
            return
        if client.lost_at is None:
            client.lost_at = self._around.now
            for choice, tokens in client.tokens.items():
                if choice not in client.cancelled_choices and random.random() < 0.3:
                    client.forget_after(choice, random.randint(0, len(tokens)))
        self._around.schedule.after(random.choice([0.01, 0.2, 2.0]) * random.random(), partial(self._come_back, client))

    def fell_silent(self, gateway: SimulatedGateway) -> None:
        random = self._around.random
        for client in gateway.clients:
            if client.at is gateway.process and not client.over and random.random() < self._around.strength.impatience:
                self._around.schedule.after(0.3 + 4.0 * random.random(), partial(self._leave, client, gateway))

    def ends(self, client: SimulatedClient, choice: int | None) -> None:
        """It wants no more of a choice, or of all."""
        for gateway in self._gateways.values():
            if client.at is gateway.process:
                gateway.process.take("client", partial(gateway.cancel, client, choice))
                return

    def _leave(self, client: SimulatedClient, gateway: SimulatedGateway) -> None:
        """It is still silent: the client goes elsewhere. Its server learns of that once it is awake."""
        streamed = client.reads
        if client.over or client.at is not gateway.process or not gateway.process.frozen:
            return
        self._around.note(client.request_id, f"leaves {gateway.gateway}, which is silent")
        self._around.counts["left_silent"] += 1
        if streamed is not None:
            gateway.process.take("client", partial(gateway.left, client, streamed))
            client.left_at = self._around.now
        client.disconnected()

    def _come_back(self, client: SimulatedClient) -> None:
        if client.over or client.at is not None:
            return
        awake = [gateway for gateway in self._gateways.values() if gateway.process.awake]
        if awake:
            self._around.random.choice(awake).attach(client, partial(self._refused, client))
        else:
            self._refused(client, Unavailable("no gateway answers"))

    def _refused(self, client: SimulatedClient, error: SegueError) -> None:
        """What is unavailable is asked for again, for a while."""
        self._around.note(client.request_id, f"cannot come back: {error!r}")
        client.at = None
        since = self._around.now if client.lost_at is None else client.lost_at
        if isinstance(error, Unavailable) and self._around.now - since < PATIENCE_S:
            self._around.schedule.after(0.5 * self._around.random.random(), partial(self._come_back, client))
        else:
            client.on_end(error)
