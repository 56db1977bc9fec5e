"""What a NATS server in operator mode knows people by, made for one test: an operator, an account, a user's `.creds` file.

A token is a JWT that NATS signs with nkeys (https://docs.nats.io, "JWT authentication"): the operator signs its own and the
account's, the account signs the user's.
"""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path

import nkeys


@dataclass(frozen=True, slots=True)
class Operated:
    """`configuration` starts a server that knows one account; `creds` is of a user of it, `stranger` of nobody's account."""

    configuration: str
    creds: str
    stranger: str


def make_operated(folder: Path) -> Operated:
    operator, account, stranger = (_key(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, *[nkeys.PREFIX_BYTE_ACCOUNT] * 2))
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    operator_token = _token(operator, operator, {"type": "operator"})
    account_token = _token(operator, account, {"type": "account", "limits": unlimited | {"wildcards": True}})
    configuration = folder / "operated.conf"
    configuration.write_text(
        f"operator: {operator_token}\nresolver: MEMORY\nresolver_preload: {{ {_name(account)}: {account_token} }}\n"
    )
    return Operated(str(configuration), _creds(folder / "user.creds", account), _creds(folder / "stranger.creds", stranger))


def _creds(path: Path, account: nkeys.KeyPair) -> str:
    user = _key(nkeys.PREFIX_BYTE_USER)
    token = _token(account, user, {"type": "user", "subs": -1, "data": -1, "payload": -1})
    seed = user.seed.decode()
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    return str(path)


def _token(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, nats: dict[str, object]) -> str:
    header = _part({"typ": "JWT", "alg": "ed25519-nkey"})
    claims = _part({"jti": os.urandom(8).hex(), "iat": 1, "iss": _name(issuer), "sub": _name(subject), "nats": nats | {"version": 2}})
    signed = f"{header}.{claims}"
    return f"{signed}.{_base64(issuer.sign(signed.encode()))}"


def _part(value: dict[str, object]) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _key(prefix: int) -> nkeys.KeyPair:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def _name(key: nkeys.KeyPair) -> str:
    name: str = key.public_key.decode()
    return name
