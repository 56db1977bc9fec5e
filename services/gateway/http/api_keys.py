"""Who may ask. Keys are compared by their digests, all of them, so that time says nothing about them.

A key may be bound to a class of requests: `KEY class=NAME`, wherever keys are given.
"""

import hashlib
import hmac
from collections.abc import Sequence

from common.values.errors import NotAuthorised

_CLASS_MARK = " class="


class ApiKeys:
    """No keys means that everyone may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        bound = [split_key(text) for text in keys]
        self._digests = [_digest(key.encode()) for key, _ in bound]
        self._classes = {_tenant(key.encode()): name for key, name in bound if name is not None}

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: bytes) -> bool:
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return not self.required or any(matches)

    def tenant(self, key: bytes) -> str:
        """Who this is, as far as streams are concerned: a digest of the key, the same for all where none is needed."""
        return _tenant(key) if self.required else ""

    def request_class(self, tenant: str) -> str | None:
        """The class that the tenant's key is bound to."""
        return self._classes.get(tenant)

    def check(self, authorization: bytes | None) -> str:
        """Takes the value of the Authorization header; returns the tenant. Raises NotAuthorised."""
        if not self.required:
            return ""
        if authorization is None:
            raise NotAuthorised("an API key is needed: send it as `Authorization: Bearer <key>`")
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not self.accepts(key.strip()):
            raise NotAuthorised("this API key is not known here")
        return self.tenant(key.strip())


def split_key(text: str) -> tuple[str, str | None]:
    """A key as it was given, and the class that it is bound to."""
    key, mark, name = text.partition(_CLASS_MARK)
    return key.strip(), name.strip() if mark else None


def _tenant(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=16, person=b"segue-tenant").hexdigest()


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).digest()
