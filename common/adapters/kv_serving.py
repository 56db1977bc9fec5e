"""A background task that its owner starts and stops, and whose crash is heard when it happens, not when it is stopped."""

import asyncio
from collections.abc import Coroutine


class ServingTask:
    """Runs one coroutine until `stop`. If it ends by an error before, the event loop's exception handler is told at once."""

    def __init__(self, work: Coroutine[None, None, None], name: str) -> None:
        self._task = asyncio.create_task(work, name=name)
        self._task.add_done_callback(self._report)

    @staticmethod
    def _report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": f"{task.get_name()} crashed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    async def stop(self) -> None:
        """Cancel it and wait until it has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
