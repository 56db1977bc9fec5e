"""OpenAI's error object, for every status and for errors within a stream."""

import msgspec

from common.values.errors import NotAuthorised, Overloaded, RequestError, RequestFailed, SegueError, Unavailable


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorBody


def error_status(error: SegueError) -> int:
    match error:
        case RequestError() | Unavailable() | RequestFailed():
            return error.status
        case _:
            return 500


def error_object(error: SegueError) -> ErrorObject:
    match error:
        case RequestError():
            body = ErrorBody(message=str(error), type=_request_type(error), param=error.param, code=error.code)
        case Unavailable():
            kind = "rate_limit_error" if isinstance(error, Overloaded) else "server_error"
            body = ErrorBody(message=str(error), type=kind, param=None, code=error.code)
        case RequestFailed():
            body = ErrorBody(message=str(error), type="server_error", param=None, code=error.code)
        case _:
            body = ErrorBody(message="an internal error", type="server_error", param=None, code="internal_error")
    return ErrorObject(error=body)


def _request_type(error: RequestError) -> str:
    if isinstance(error, NotAuthorised):
        return "authentication_error"
    return "not_found_error" if error.status == 404 else "invalid_request_error"
