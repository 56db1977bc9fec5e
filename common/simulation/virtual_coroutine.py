"""Runs the product's coroutines in virtual time: what they await is an action that is answered later, not an event loop."""

from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import TypeVar

from common.values.errors import InvariantBroken, RequestError, SegueError, Unavailable

Result = TypeVar("Result")
Answered = Callable[[object], None]
Failed = Callable[[SegueError], None]


class Wait:
    """`start` is given what to call with the answer, and what to call with an error; one of the two, once, not at once."""

    def __init__(self, start: Callable[[Answered, Failed], None]) -> None:
        self.start = start

    def __await__(self) -> Generator["Wait", object, object]:
        return (yield self)


def drive(coroutine: Coroutine[Wait, object, Result], done: Callable[[Result], None], failed: Failed | None = None) -> None:
    """Run it to its first wait, and on with each answer. `failed` is told of what the client may be told; other errors, and all
    where there is no `failed`, break the world."""

    def advance(resume: Callable[[], Wait]) -> None:
        try:
            wait = resume()
        except StopIteration as end:
            result: Result = end.value
        except (RequestError, Unavailable) as error:
            if failed is None:
                raise InvariantBroken(f"nobody handles {error!r}") from error
            failed(error)
            return
        else:
            wait.start(
                lambda answer: advance(partial(coroutine.send, answer)),
                lambda error: advance(partial(coroutine.throw, error)),
            )
            return
        done(result)

    advance(partial(coroutine.send, None))
