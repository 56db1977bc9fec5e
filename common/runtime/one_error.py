"""A task group raises a group of errors even where one is all there can be; callers want that one."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_error(first: type[BaseException] | None = None) -> Iterator[None]:
    """Raise a single error out of a group: one of type `first` if there is any, else the earliest."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = _leaves(group)
        raise next((error for error in errors if first is not None and isinstance(error, first)), errors[0]) from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
