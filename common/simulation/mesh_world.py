"""A whole mesh in virtual time from one seed: workers, gateways, broker, connections, store, clients and faults.

`run` lets the world happen, ends all faults, waits until it is quiet, and checks that nothing is left. Laws that can break at
once are checked where they can; all of them raise InvariantBroken.
"""

from collections.abc import Callable
from functools import partial
from random import Random

from common.protocol.messages import Snapshot, TokenFrame
from common.simulation.client_returns import ClientReturns
from common.simulation.emission_ledger import EmissionLedger
from common.simulation.fault_strength import FaultStrength, draw_strength
from common.simulation.random_requests import MOST_CHOICES, draw_prompt, draw_sampling
from common.simulation.shadow_kv import reference
from common.simulation.simulated_broker import Away, SimulatedBroker
from common.simulation.simulated_client import SimulatedClient
from common.simulation.simulated_connections import SimulatedConnections
from common.simulation.simulated_gateway import SimulatedGateway
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.simulated_store import STORE_FAULTS, SimulatedStore
from common.simulation.simulated_worker import SimulatedWorker
from common.simulation.surroundings import Surroundings
from common.simulation.worker_shape import LONG, SHORT, draw_shapes
from common.simulation.world_laws import check_end, check_failures
from common.values.errors import InvariantBroken
from common.values.ids import GatewayId, Incarnation, RequestId, WorkerId

SETTLED_S = 0.4
RECORDED_S = 1.0
SLOW_STEP_S = 0.08
FAULTS_AMONG = 900
LAST_ARRIVAL_S = 1.5
QUIET_WITHIN_S = 60.0
STEP_BOUND_S = 11.0
"""After which a worker's watch on its steps has ended the process."""
AWAY: tuple[Away, ...] = ("broken", "swallows", "late")


class MeshWorld:
    """Build it and `run` it once. What happened is in `around.counts` and, where wanted, in `around.trace`."""

    def __init__(self, seed: int, *, strength: FaultStrength | None = None, trace: bool = False) -> None:
        random = Random(seed)
        drawn = draw_strength(random)
        self.around = Surroundings(random=random, strength=drawn if strength is None else strength, trace=[] if trace else None)
        self.strength = self.around.strength
        self.broker = SimulatedBroker(self.around)
        self.store = SimulatedStore(self.around)
        settled = self.strength.drains + self.strength.role_changes == 0
        self.ledger = EmissionLedger(exact=self.strength.message_twice == 0.0, settled=settled)
        self.network = SimulatedConnections(self.around)
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        self.gateways: dict[GatewayId, SimulatedGateway] = {}
        self.lost_gateways: dict[Incarnation, float] = {}
        self.returns = ClientReturns(self.around, self.gateways)
        self.clients: list[SimulatedClient] = []
        self._faults_end_at = self.around.now
        self.around.note("world", self.strength)
        self._populate()

    def run(self) -> None:
        schedule = self.around.schedule
        self._run_until(self.around.now + SETTLED_S)
        for _ in range(self.around.random.choice([3, 6, 12])):
            schedule.after(self.around.random.random() ** 2 * LAST_ARRIVAL_S, self._start_client)
        faults = self._plan_faults()
        until = schedule.now + LAST_ARRIVAL_S
        while faults or schedule.now < max(until, self._faults_end_at):
            while faults and faults[0][0] <= schedule.ran:
                faults.pop(0)[1]()
            schedule.run_next()
        self.around.calm_down()
        self.around.note("world", "no more faults")
        self._wait_until_quiet()
        self._run_until(self.around.now + RECORDED_S)
        check_failures(self)
        check_end(self)

    # ------------------------------------------------------------------ the parts

    def _populate(self) -> None:
        random = self.around.random
        length = LONG if self.strength.step_s >= SLOW_STEP_S else SHORT
        for number in range(random.choice([1, 1, 2, 3])):
            gateway = SimulatedGateway(f"g{number}", self.around, self.broker, self.store, self.workers)
            self.gateways[gateway.gateway] = gateway
        for number, shape in enumerate(draw_shapes(random, random.choice([2, 2, 3, 4]), length)):
            worker = WorkerId(f"w{number}")
            self.around.note(worker, shape)
            self.workers[worker] = SimulatedWorker(worker, shape, self)
        self.length = length

    def publish_frame(self, worker: SimulatedWorker, gateway: GatewayId, frame: TokenFrame) -> None:
        receiver = self.gateways[gateway]
        what = [(entry.request_id, entry.choice, entry.attempt, entry.new.first) for entry in frame.entries]
        self.broker.publish(worker.process, receiver.process, partial(receiver.on_frame, frame), f"frame {what}")

    def announce(self, worker: SimulatedWorker, snapshot: Snapshot) -> None:
        what = f"snapshot {snapshot.snapshot.sequence_number}" + (", gone" if snapshot.gone else "")
        for gateway in self.gateways.values():
            self.broker.publish(worker.process, gateway.process, partial(gateway.on_snapshot, snapshot), what)
        for other in self.workers.values():
            if other is not worker:
                self.broker.publish(worker.process, other.process, partial(other.on_snapshot, snapshot), what)

    def broker_answers(self, worker: SimulatedWorker) -> bool:
        return self.broker.answers_pings(worker.process)

    def _start_client(self) -> None:
        random = self.around.random
        gateway = random.choice(list(self.gateways.values()))
        if not gateway.process.awake:
            return
        prompt = draw_prompt(random, [client.prompt for client in self.clients])
        sampling = draw_sampling(random, self.length.most_new_tokens)
        choices = random.choice([1, 1, 2, MOST_CHOICES])
        client = SimulatedClient(
            request_id=RequestId(f"r{len(self.clients)}"),
            prompt=prompt,
            sampling=sampling,
            expected={choice: reference(prompt, sampling, choice, self.length.max_model_len)[0] for choice in range(choices)},
            come_back=self.returns.lost_connection,
            deadline_s=random.choice([0.1, 3.0]) if random.random() < self.strength.deadlines else None,
            lingers=random.random() < 0.5,
        )
        gateway.start(client)
        if client.cut:
            return
        self.clients.append(client)
        if random.random() < self.strength.leaving:
            choice = random.choice([None, random.randrange(choices)])
            self.around.schedule.after(random.random() * 40 * self.strength.step_s, partial(self.returns.ends, client, choice))

    # ------------------------------------------------------------------ faults

    def _plan_faults(self) -> list[tuple[int, Callable[[], None]]]:
        """By number of actions, not by time: something always goes on when one strikes."""
        strength, random = self.strength, self.around.random
        planned: list[Callable[[], None]] = [
            *[self._kill_worker] * strength.deaths,
            *[self._freeze_worker] * strength.freezes,
            *[self._hang_worker] * strength.hangs,
            *[self._drain_worker] * strength.drains,
            *[self._change_role] * strength.role_changes,
            *[self._kill_gateway] * strength.gateway_deaths,
            *[self._freeze_gateway] * strength.gateway_freezes,
            *[self._cut_broker] * strength.outages,
            *[self._part] * strength.partitions,
            *[self._break_connection] * strength.breaks,
            *[self._cut_store] * strength.store_outages,
        ]
        first = self.around.schedule.ran
        most = random.choice([200, FAULTS_AMONG])
        return sorted(((first + random.randint(0, most), act) for act in planned), key=lambda fault: fault[0])

    def _lasts(self, *choices: float) -> float:
        seconds = self.around.random.choice(choices)
        self._faults_end_at = max(self._faults_end_at, self.around.now + seconds)
        return seconds

    def _kill_worker(self) -> None:
        up = [worker for worker in self.workers.values() if worker.process.up]
        if up:
            self.around.counts["death"] += 1
            worker = self.around.random.choice(up)
            worker.die()
            self._restart_later(worker.process, worker.start_again, self._lasts(0.3, 1.0, 6.0))

    def _hang_worker(self) -> None:
        """A step that never ends, in a process that answers all the same, until its watch ends the process."""
        ready = [worker for worker in self.workers.values() if worker.process.awake and not worker.hangs]
        if ready:
            self.around.counts["hang"] += 1
            worker = self.around.random.choice(ready)
            worker.hang()
            life = worker.process.life
            self.around.schedule.after(self._lasts(STEP_BOUND_S), partial(self._end_hanging, worker, life))

    def _end_hanging(self, worker: SimulatedWorker, life: int) -> None:
        if worker.process.up and worker.process.life == life:
            worker.die()
            self._restart_later(worker.process, worker.start_again, self._lasts(0.3, 1.0))

    def _drain_worker(self) -> None:
        """A rolling upgrade: somebody else must be there."""
        ready = [worker for worker in self.workers.values() if worker.process.awake]
        if len(ready) > 1:
            worker = self.around.random.choice(ready)
            self.around.counts["drain"] += 1
            self._lasts(12.0)
            worker.drain(lambda: self._restart_later(worker.process, worker.start_again, 0.5))

    def _change_role(self) -> None:
        """As a planner would, but without sense: whatever role, at whatever time."""
        awake = [worker for worker in self.workers.values() if worker.process.awake]
        if awake:
            self.around.counts["role_change"] += 1
            worker = self.around.random.choice(awake)
            worker.change_role(self.around.random.choice(("prefill", "decode", "both")), self.around.counts["role_change"])

    def _kill_gateway(self) -> None:
        up = [gateway for gateway in self.gateways.values() if gateway.process.up]
        if up:
            self.around.counts["gateway_death"] += 1
            gateway = self.around.random.choice(up)
            self.lost_gateways[gateway.incarnation] = self.around.now
            gateway.die()
            self._restart_later(gateway.process, gateway.start_again, self._lasts(0.3, 1.0, 6.0))

    def _restart_later(self, process: SimulatedProcess, start: Callable[[], None], seconds: float) -> None:
        self.around.schedule.after(seconds, lambda: None if process.up else start())

    def _freeze_worker(self) -> None:
        self._freeze([worker.process for worker in self.workers.values()], "freeze")

    def _freeze_gateway(self) -> None:
        self._freeze([gateway.process for gateway in self.gateways.values()], "gateway_freeze")
        for gateway in self.gateways.values():
            if gateway.process.frozen:
                self.returns.fell_silent(gateway)

    def _freeze(self, processes: list[SimulatedProcess], what: str) -> None:
        awake = [process for process in processes if process.awake]
        if awake:
            self.around.counts[what] += 1
            process = self.around.random.choice(awake)
            process.freeze()
            self.around.schedule.after(self._lasts(0.2, 2.0, 7.0, 12.0), process.wake)

    def _cut_broker(self) -> None:
        self.around.counts["outage"] += 1
        seconds, away = self._lasts(0.1, 1.0, 5.0), self.around.random.choice(AWAY)
        for process in self._processes():
            self.broker.cut(process, seconds, away)

    def _part(self) -> None:
        """One process loses its way to the broker, or two workers theirs to each other."""
        self.around.counts["partition"] += 1
        random, processes = self.around.random, self._processes()
        if processes and random.random() < 0.5:
            process = random.choice(processes)
            self.broker.cut(process, self._lasts(0.2, 2.0, 8.0), random.choice(AWAY))
        else:
            a, b = random.sample(list(self.workers), 2)
            self.network.part(a, b, self._lasts(0.2, 3.0, 9.0))

    def _break_connection(self) -> None:
        if self.network.connections:
            self.around.counts["break"] += 1
            self.network.end(self.around.random.choice(self.network.connections), by=None)

    def _cut_store(self) -> None:
        self.around.counts["store_outage"] += 1
        self.store.cut(self._lasts(0.2, 2.0, 5.0), self.around.random.choice(STORE_FAULTS))

    def _processes(self) -> list[SimulatedProcess]:
        workers = [worker.process for worker in self.workers.values()]
        return [process for process in (*workers, *(gateway.process for gateway in self.gateways.values())) if process.up]

    # ------------------------------------------------------------------ the end

    def _run_until(self, when: float) -> None:
        while self.around.now < when and self.around.schedule.run_next():
            pass

    def _wait_until_quiet(self) -> None:
        work = sum(len(tokens) for client in self.clients for tokens in client.expected.values())
        until = self.around.now + QUIET_WITHIN_S + 3.0 * self.strength.step_s * work
        while not self._quiet():
            self._run_until(self.around.now + 0.25)
            if self.around.now > until:
                busy = [worker for worker, part in self.workers.items() if not part.quiet]
                running = [client.request_id for client in self.clients if not client.over]
                raise InvariantBroken(f"never quiet: workers {busy} are busy, {running} run")

    def _quiet(self) -> bool:
        clients = all(client.over for client in self.clients)
        gateways = all(gateway.process.awake and not gateway.core.active for gateway in self.gateways.values())
        return clients and gateways and all(worker.quiet for worker in self.workers.values())
