"""Proof that both ends of a TCP connection know the same secret, before a byte of payload passes. Sans-I/O.

    client → server   opening: magic, 32-byte nonce
    server → client   opening: magic, 32-byte nonce
    client → server   HMAC-SHA256(secret, purpose ‖ "client" ‖ client nonce ‖ server nonce)
    server → client   HMAC-SHA256(secret, purpose ‖ "server" ‖ client nonce ‖ server nonce)

The role in the MAC makes it useless when it is reflected, the nonces when it is replayed, the purpose on another kind of
connection. The client proves itself first, so a stranger who dials learns nothing that was made with the secret. Nothing is
encrypted: the mesh's own network is trusted not to be read, only not to be open to anybody.
"""

import hashlib
import hmac
from typing import Literal

from common.values.errors import PeerError

OPENING_MAGIC = b"SEGUE/1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
OPENING_BYTES = len(OPENING_MAGIC) + NONCE_BYTES

Role = Literal["client", "server"]


class Handshake:
    """One side of it. Send `opening()`, feed `receive` with what comes, send what it returns, until `done`."""

    def __init__(self, secret: bytes, role: Role, purpose: str, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"the nonce has {NONCE_BYTES} bytes")
        self._secret = secret
        self._role: Role = role
        self._purpose = purpose.encode()
        self._nonce = nonce
        self._peer_nonce: bytes | None = None
        self.done = False

    @property
    def expects(self) -> int:
        """Bytes that the next call of `receive` takes."""
        return OPENING_BYTES if self._peer_nonce is None else PROOF_BYTES

    def opening(self) -> bytes:
        """What the client sends first. The server's own goes out as the answer to it."""
        return OPENING_MAGIC + self._nonce

    def receive(self, data: bytes) -> bytes:
        """The peer's next piece, exactly `expects` bytes; returns what to send, maybe nothing. Raises PeerError for a stranger."""
        if self._peer_nonce is None:
            return self._receive_opening(data)
        peer_role: Role = "server" if self._role == "client" else "client"
        if not hmac.compare_digest(data, self._proof(peer_role)):
            raise PeerError("the peer does not know the secret")
        self.done = True
        return self._proof("server") if self._role == "server" else b""

    def _receive_opening(self, data: bytes) -> bytes:
        if not data.startswith(OPENING_MAGIC) or len(data) != OPENING_BYTES:
            raise PeerError("the peer does not speak this protocol")
        self._peer_nonce = data[len(OPENING_MAGIC) :]
        return self._proof("client") if self._role == "client" else self.opening()

    def _proof(self, role: Role) -> bytes:
        peer_nonce = self._peer_nonce or b""
        nonces = self._nonce + peer_nonce if self._role == "client" else peer_nonce + self._nonce
        return hmac.new(self._secret, self._purpose + b"\0" + role.encode() + b"\0" + nonces, hashlib.sha256).digest()
