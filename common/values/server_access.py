"""How a process proves itself to brokers and stores, and what it takes as their proof, beside what stands in their URLs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. `ca` None trusts what the system trusts; `certificate` and `key` are ours, for servers that ask for one."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsIdentity:
    """At most one: a `.creds` file (JWT and key), or a file with an nkey seed."""

    creds_file: str | None = None
    nkey_file: str | None = None


SYSTEM_TLS = TlsFiles()
ANONYMOUS = NatsIdentity()
