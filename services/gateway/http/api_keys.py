"""Who may ask. Keys are compared by their digests, all of them, so that time says nothing about them."""

import hashlib
import hmac
from collections.abc import Sequence

from common.values.errors import NotAuthorised


class ApiKeys:
    """No keys means that everyone may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: bytes) -> bool:
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return not self.required or any(matches)

    def tenant(self, key: bytes) -> str:
        """Who this is, as far as streams are concerned: a digest of the key, the same for all where none is needed."""
        return hashlib.blake2b(key, digest_size=16, person=b"segue-tenant").hexdigest() if self.required else ""

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


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).digest()
