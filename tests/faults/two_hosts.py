"""A second host: a network namespace at the end of a wire that can be cut, lose packets, and take its time.

The wire is two TUN devices whose packets this process relays, one here and one in the namespace. That needs root, the `ip`
command and /dev/net/tun, and nothing of the kernel's traffic control.
"""

import asyncio
import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

TUN_DEVICE = Path("/dev/net/tun")
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
MTU_BYTES = 9000
PACKETS_A_TURN = 64


def why_not_two_hosts() -> str | None:
    """What is missing here, in words."""
    if os.geteuid() != 0:
        return "two hosts: only root may make network namespaces"
    if shutil.which("ip") is None:
        return "two hosts: the command `ip` is missing"
    return None if TUN_DEVICE.exists() else f"two hosts: {TUN_DEVICE} is missing"


@dataclass
class Wire:
    """`near` and `far` are the addresses of its ends; `run_far` in front of a command runs it on the far host."""

    near: str
    far: str
    run_far: tuple[str, ...]
    delay_s: float = 0.0
    loss: float = 0.0
    is_cut: bool = False
    dropped: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(1))

    def heal(self) -> None:
        self.delay_s, self.loss, self.is_cut = 0.0, 0.0, False

    def carry(self, source: int, target: int) -> None:
        """Move what waits at one end to the other."""
        loop = asyncio.get_running_loop()
        for _ in range(PACKETS_A_TURN):
            try:
                packet = os.read(source, MTU_BYTES)
            except BlockingIOError:
                return
            if self.is_cut or self._random.random() < self.loss:
                self.dropped += 1
            elif self.delay_s:
                loop.call_later(self.delay_s, _write, target, packet)
            else:
                _write(target, packet)


@asynccontextmanager
async def two_hosts() -> AsyncIterator[Wire]:
    """Both ends are gone afterwards. Raises OSError where the kernel refuses."""
    number = os.getpid() % 250
    name, near_device, far_device = f"segue-{number}", f"segue{number}a", f"segue{number}b"
    wire = Wire(f"10.213.{number}.1", f"10.213.{number}.2", ("ip", "netns", "exec", name))
    near, far = _open_tun(near_device), _open_tun(far_device)
    loop = asyncio.get_running_loop()
    try:
        _ip("netns", "add", name)
        _ip("link", "set", far_device, "netns", name)
        _set_up((), near_device, wire.near, wire.far)
        _set_up(("-n", name), far_device, wire.far, wire.near)
        _ip("-n", name, "link", "set", "lo", "up")
        loop.add_reader(near, wire.carry, near, far)
        loop.add_reader(far, wire.carry, far, near)
        yield wire
    finally:
        for end in (near, far):
            loop.remove_reader(end)
            os.close(end)
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _set_up(namespace: tuple[str, ...], device: str, address: str, peer: str) -> None:
    _ip(*namespace, "address", "add", address, "peer", peer, "dev", device)
    _ip(*namespace, "link", "set", device, "mtu", str(MTU_BYTES), "up")


def _open_tun(name: str) -> int:
    """A device of this name, which is gone once the descriptor is closed."""
    descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _write(target: int, packet: bytes) -> None:
    with suppress(OSError):  # a full or closed device drops it, as networks do
        os.write(target, packet)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
