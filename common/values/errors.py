"""Every error of the mesh, in one tree.

SegueError
├── RequestError              the client's fault: has an HTTP status and a code
│   ├── InvalidRequest        400 invalid_request
│   ├── ContextTooLong        400 context_length_exceeded
│   ├── NotAuthorised         401 invalid_api_key
│   ├── ModelNotFound         404 model_not_found
│   ├── StreamNotFound        404 stream_not_found
│   ├── IdempotencyKeyReused  422 idempotency_key_reused
│   ├── PayloadTooLarge       413 payload_too_large
│   └── NeverFits             400 kv_cache_too_small
├── Unavailable               retryable: 503 (or 429) with Retry-After
│   ├── Overloaded            429 overloaded
│   ├── Moved                 503 moved: another gateway goes on with the request
│   └── BrokerUnavailable / StoreUnavailable
├── RequestFailed             an accepted request ended with an error (after the 200: the stream's error event)
├── PeerError                 another process broke the protocol: it is answered, counted and dropped
│   └── WrongVersion          it speaks a release of the protocol that is too far from ours
├── SettingsError             a bad flag, environment variable or file entry: stops the start
├── ModelError                a model that cannot be loaded or served
├── TransportBroken           KV can be moved no more: stops the worker loudly
└── InvariantBroken           a bug of ours: stops the worker loudly
"""


class SegueError(Exception):
    """The root. `str(error)` says what happened and what to do about it."""


class RequestError(SegueError):
    """The client's fault. `param` names the offending field of the body where there is one."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    pass


class ContextTooLong(RequestError):
    code = "context_length_exceeded"


class NotAuthorised(RequestError):
    status = 401
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    status = 404
    code = "model_not_found"


class StreamNotFound(RequestError):
    status = 404
    code = "stream_not_found"


class IdempotencyKeyReused(RequestError):
    status = 422
    code = "idempotency_key_reused"


class PayloadTooLarge(RequestError):
    status = 413
    code = "payload_too_large"


class NeverFits(RequestError):
    code = "kv_cache_too_small"


class Unavailable(SegueError):
    """The mesh cannot take this now. `retry_after_s` is what the client is told."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    status = 429
    code = "overloaded"


class Moved(Unavailable):
    code = "moved"


class BrokerUnavailable(Unavailable):
    code = "broker_unavailable"


class StoreUnavailable(Unavailable):
    code = "state_store_unavailable"


class RequestFailed(SegueError):
    """An accepted request that ended with an error; `code` goes to the client."""

    def __init__(self, message: str, *, code: str = "internal_error", status: int = 500) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class PeerError(SegueError):
    pass


class WrongVersion(PeerError):
    """It speaks a release of the protocol that is too far from ours."""


class SettingsError(SegueError):
    pass


class ModelError(SegueError):
    pass


class InvariantBroken(SegueError):
    pass


class TransportBroken(SegueError):
    """What moves KV in this process has failed as a whole."""
