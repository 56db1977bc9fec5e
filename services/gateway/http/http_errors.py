"""Errors that only HTTP knows, in the one tree of errors, and how any exception becomes an answer."""

import logging

from common.values.errors import RequestError, RequestFailed, SegueError, Unavailable


class RouteNotFound(RequestError):
    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class UnsupportedMediaType(RequestError):
    status = 415
    code = "unsupported_media_type"


class Stopping(Unavailable):
    code = "stopping"


def answerable(error: Exception, log: logging.Logger) -> SegueError:
    """The error itself where a client may see it; a bug of ours is logged here and shown as an internal error."""
    if isinstance(error, SegueError):
        return error
    log.error("unexpected error in a request", exc_info=error)
    return RequestFailed("an internal error")
