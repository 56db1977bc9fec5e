"""The settings that UCX reads from its environment when it is loaded, and why each is what it is.

| setting | value | why |
| --- | --- | --- |
| `UCX_TLS` | `posix,sysv,tcp` | never `cma`: with it a dead peer aborts the survivor. With RDMA, name `rc` too |
| `UCX_MM_ERROR_HANDLING` | `y` | else the error handling of endpoints silently drops shared memory |
| `UCX_NET_DEVICES` | the interface of the host | else every worker listens on all interfaces |
| `UCX_TCP_TX_SEG_SIZE`, `UCX_TCP_RX_SEG_SIZE` | `256k` | the default of 8k is three to four times slower |
| `UCX_TCP_PORT_RANGE` | as configured | the ports that a firewall has to let through |
| `UCX_KEEPALIVE_INTERVAL` | `1s` | how soon a dead peer is noticed over shared memory |
| `UCX_POSIX_HUGETLB_MODE`, `UCX_SYSV_HUGETLB_MODE` | `n` | a mapping of huge pages cannot be protected by the page |
| `UCX_HANDLE_ERRORS` | `none` | signals are the process's own |
| `UCX_WARN_UNUSED_ENV_VARS` | `n` | not every build knows every setting |

What the user has set stays, where it is harmless; `UCX_TLS` must not name cma, nor a group that holds it.
"""

import fcntl
import socket
import struct
from collections.abc import MutableMapping

from common.values.errors import SettingsError

_SIOCGIFADDR = 0x8915
_UNSAFE_TRANSPORTS = frozenset({"cma", "all", "sm", "shm"})
_FIXED = {"UCX_MM_ERROR_HANDLING": "y", "UCX_POSIX_HUGETLB_MODE": "n", "UCX_SYSV_HUGETLB_MODE": "n"}
_DEFAULTS = {
    "UCX_TLS": "posix,sysv,tcp",
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_KEEPALIVE_INTERVAL": "1s",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def prepare_environment(environment: MutableMapping[str, str], host: str, port_range: str | None) -> None:
    """Set what UCX has to find. Raises SettingsError for a user's `UCX_TLS` that would bring cma in."""
    transports = {name.strip() for name in environment.get("UCX_TLS", "").split(",")}
    if transports & _UNSAFE_TRANSPORTS or next(iter(environment.get("UCX_TLS", "")), "") == "^":
        raise SettingsError(f"UCX_TLS={environment['UCX_TLS']} brings in cma; name the transports instead, such as rc,posix,sysv,tcp")
    for name, value in _DEFAULTS.items():
        environment.setdefault(name, value)
    environment.update(_FIXED)
    if "UCX_NET_DEVICES" not in environment:
        environment["UCX_NET_DEVICES"] = interface_of(host)
    if port_range is not None:
        environment["UCX_TCP_PORT_RANGE"] = port_range


def interface_of(host: str) -> str:
    """The network interface that carries the address of `host`; "all" for the wildcard. Raises SettingsError where none does."""
    try:
        wanted = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise SettingsError(f"host {host!r} has no IPv4 address: {error}") from error
    if wanted == "0.0.0.0":
        return "all"
    if str(wanted).startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == wanted:
                return name
    raise SettingsError(f"no network interface has the address {wanted} of host {host!r}")
