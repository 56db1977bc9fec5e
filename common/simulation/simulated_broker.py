"""The broker as its users see it: at most once, ordered per publisher and receiver, and away now and then.

A connection that is away is broken (what is under way is lost, what is published meanwhile leaves when it is back),
swallows (nothing passes, nobody is told), or is late (the network mends in time: all arrives, later).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from common.simulation.schedule import Action
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.surroundings import Surroundings

Away = Literal["broken", "swallows", "late"]
Reply = TypeVar("Reply")


@dataclass(slots=True, eq=False)
class _Question:
    """`failed` is called where the connection breaks before there is an answer."""

    failed: Action
    open: bool = True


@dataclass(slots=True)
class _Line:
    """One process's connection to the broker. `breaks` counts losses of what was under way."""

    back_at: float = 0.0
    away: Away = "broken"
    breaks: int = 0
    questions: list[_Question] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    sender: SimulatedProcess
    receiver: SimulatedProcess
    sender_breaks: int
    receiver_breaks: int
    action: Action
    what: str


class SimulatedBroker:
    """`publish` and `ask` are what a process's client does; `cut` is a fault."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)
        self._arrivals: dict[tuple[str, str], float] = {}

    def connected(self, process: SimulatedProcess) -> bool:
        """What the process's own client knows: a silent connection still counts."""
        line = self._line(process)
        return self._around.now >= line.back_at or line.away != "broken"

    def answers_pings(self, process: SimulatedProcess) -> bool:
        return self._around.now >= self._line(process).back_at

    def cut(self, process: SimulatedProcess, seconds: float, away: Away) -> None:
        self._around.note(process.name, f"broker {away} for {seconds:.2f} s")
        line = self._line(process)
        line.back_at, line.away = self._around.now + seconds, away
        if away == "late":
            return
        line.breaks += 1
        if away == "broken":
            questions, line.questions = line.questions, []
            for question in questions:
                process.take("broker", partial(_fail, question))

    def publish(self, sender: SimulatedProcess, receiver: SimulatedProcess, action: Action, what: str) -> None:
        """`action` happens in the receiver, if the message arrives."""
        around, line = self._around, self._line(sender)
        leaves = around.now
        if around.now < line.back_at:
            if line.away == "swallows":
                self._lost(sender, receiver, what)
                return
            leaves = line.back_at
        if around.random.random() < around.strength.message_loss:
            self._lost(sender, receiver, what)
            return
        message = _Message(
            sender=sender,
            receiver=receiver,
            sender_breaks=line.breaks,
            receiver_breaks=self._line(receiver).breaks,
            action=action,
            what=what,
        )
        twice = around.random.random() < around.strength.message_twice
        for _ in range(1 + twice):
            arrival = max(
                leaves + around.takes(around.strength.message_delay_s), self._arrivals.get((sender.name, receiver.name), 0.0)
            )
            self._arrivals[sender.name, receiver.name] = arrival
            around.schedule.at(arrival, partial(self._arrive, message))

    def ask(
        self,
        sender: SimulatedProcess,
        receiver: SimulatedProcess,
        *,
        timeout_s: float,
        handle: Callable[[], Reply],
        answered: Callable[[Reply | None], None],
        failed: Action,
        what: str,
    ) -> None:
        """`handle` runs in the receiver; then one of the others in the sender: `answered` with None after the time-out, or at
        once where nobody subscribes; `failed` where the sender's connection is known to be broken."""
        line = self._line(sender)
        question = _Question(failed)
        if not self.connected(sender):
            sender.after(0.0, "broker", partial(_fail, question))
            return
        line.questions.append(question)

        def settle(reply: Reply | None) -> None:
            if question.open:
                question.open = False
                if question in line.questions:
                    line.questions.remove(question)
                answered(reply)

        def ask_receiver() -> None:
            reply = handle()
            self.publish(receiver, sender, partial(settle, reply), f"answer to {what}")

        sender.after(timeout_s, "timer", partial(settle, None))
        if not receiver.up and self.answers_pings(sender):
            sender.after(self._around.takes(self._around.strength.message_delay_s), "broker", partial(settle, None))
            return
        self.publish(sender, receiver, ask_receiver, what)

    def forget(self, process: SimulatedProcess) -> None:
        """The process died, and its connection with it."""
        line = self._line(process)
        line.breaks += 1
        for question in line.questions:
            question.open = False
        line.questions.clear()

    def _arrive(self, message: _Message) -> None:
        around, line = self._around, self._line(message.receiver)
        broken = line.breaks != message.receiver_breaks
        left_in_time = self._line(message.sender).breaks == message.sender_breaks or around.random.random() < 0.5
        if broken or not left_in_time or not message.receiver.up:
            self._lost(message.sender, message.receiver, message.what)
        elif around.now < line.back_at:
            if line.away == "late":
                around.schedule.at(line.back_at, partial(self._arrive, message))
            else:
                self._lost(message.sender, message.receiver, message.what)
        else:
            around.note(message.receiver.name, f"<- {message.sender.name}: {message.what}")
            message.receiver.take("broker", message.action)

    def _lost(self, sender: SimulatedProcess, receiver: SimulatedProcess, what: str) -> None:
        self._around.counts["lost_message"] += 1
        self._around.note(sender.name, f"-> {receiver.name} lost: {what}")

    def _line(self, process: SimulatedProcess) -> _Line:
        return self._lines[process.name]


def _fail(question: _Question) -> None:
    if question.open:
        question.open = False
        question.failed()
