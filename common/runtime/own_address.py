"""The address at which other machines or containers reach this process, where nobody can know it beforehand.

`--host auto`: the address from which this process reaches the mesh's first NATS server. Workers and NATS share a network,
and of several networks that a container has this is the one where its peers are; a container's name or first address may
belong to another.
"""

import socket

from common.adapters.server_urls import parse_server_url, redacted
from common.values.errors import SettingsError

AUTO_HOST = "auto"
NATS_SCHEMES = ("nats", "tls", "ws", "wss")
NATS_PORT = 4222


def address_towards(nats_urls: str) -> str:
    """The own IPv4 address on the way to the first of comma-separated NATS servers; sends nothing.

    Raises SettingsError where the server's name is unknown or no route leads there.
    """
    first = nats_urls.split(",")[0].strip()
    parts = parse_server_url(first, schemes=NATS_SCHEMES, default_port=NATS_PORT)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port))
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise SettingsError(
            f"host auto: no way to {redacted(first)} from here ({error}); name this worker's own address with --host"
        ) from error
    return address
