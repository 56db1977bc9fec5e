"""What `segue doctor` looks at, apart from UCX. Each check is a function of its own and never raises for what it finds."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from common.engine.host_memory import available_memory_bytes, shared_memory_bytes
from common.engine.model_source import bundled_file
from common.runtime.core_claims import CoreClaims, own_cores, private_folder
from common.runtime.supervisor_brokers import find_nats_server, find_valkey_server
from common.values.errors import SegueError

Verdict = Literal["ok", "warn", "fail"]
GIB = 1 << 30
LEAST_MEMORY_BYTES = 3 * GIB
LEAST_SHARED_MEMORY_BYTES = GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`fail`: serving will not work. `warn`: it will, but worse than it could. `advice` says what to do."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def all_checks(*, port: int) -> list[Finding]:
    return [
        check_python(),
        *check_packages(),
        check_model_package(),
        check_server("nats-server", find_nats_server),
        check_server("valkey", find_valkey_server),
        check_compiler(),
        check_cores(),
        check_memory(),
        check_shared_memory(),
        check_port(port),
    ]


def check_python() -> Finding:
    version = platform.python_version()
    known = (3, 11) <= sys.version_info[:2] <= (3, 14)
    return Finding(
        name="python",
        verdict="ok" if known else "fail",
        found=f"{version} at {sys.executable}",
        advice="install Python 3.11 to 3.14 and remove .venv; ./tools/segue makes it anew",
    )


def check_packages() -> list[Finding]:
    """One line for all that is well, one for what is missing, one for versions that the project was not made for."""
    found: dict[str, str] = {}
    missing, other = [], []
    for text in _requirements():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        found[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} (not {requirement.specifier})")
    torch = f", torch {found['torch']}" if "torch" in found else ""
    findings = [Finding(name="packages", verdict="ok", found=f"{len(found)} installed{torch}")]
    again = f"remove {Path(sys.prefix)} and run ./tools/segue, or: {sys.executable} -m pip install"
    if missing:
        quoted = " ".join(f"'{text}'" for text in missing)
        findings.append(Finding(name="packages", verdict="fail", found=f"missing: {', '.join(missing)}", advice=f"{again} {quoted}"))
    if other:
        findings.append(Finding(name="packages", verdict="warn", found=", ".join(other), advice=f"{again} the versions named"))
    return findings


def _requirements() -> list[str]:
    """What pyproject.toml wants for serving; installed as a package, what its metadata says."""
    source = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text("utf-8"))["project"]
        extras = project["optional-dependencies"]
        return [str(item) for item in (*project["dependencies"], *extras["worker"], *extras["serve"])]
    return [item for item in importlib.metadata.requires("segue") or [] if "extra == 'test'" not in item]


def check_model_package() -> Finding:
    try:
        return Finding(name="model", verdict="ok", found=str(bundled_file()))
    except SegueError as error:
        return Finding(name="model", verdict="warn", found="the small default model is not installed", advice=str(error))


def check_server(name: str, find: Callable[[], Path]) -> Finding:
    try:
        path = find()
        version = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (SegueError, OSError, subprocess.TimeoutExpired) as error:
        return Finding(name=name, verdict="fail", found="missing or broken", advice=str(error))
    if version.returncode != 0:
        return Finding(name=name, verdict="fail", found=f"{path} does not run", advice="install the package anew")
    words = version.stdout.split()
    return Finding(name=name, verdict="ok", found=f"{' '.join(words[:3])} at {path}")


def check_compiler() -> Finding:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is not None:
        return Finding(name="compiler", verdict="ok", found=compiler)
    if importlib.util.find_spec("ziglang") is not None:
        return Finding(name="compiler", verdict="ok", found="ziglang (python -m ziglang c++)")
    return Finding(name="compiler", verdict="warn", found="none", advice="not needed now; own kernels want one: apt install g++")


def check_cores() -> Finding:
    cores = own_cores()
    try:
        claims = CoreClaims(private_folder("cores"))
    except SegueError as error:
        return Finding(name="cores", verdict="fail", found="cannot claim cores", advice=str(error))
    free = claims.free(cores)
    claims.close()
    found = f"{len(cores)} usable ({platform.machine()}), {len(free)} not taken by another mesh, load {os.getloadavg()[0]:.1f}"
    if len(free) < 2:
        return Finding(
            name="cores", verdict="warn", found=found, advice="prefill and decode will share a core: use --both 1, or free cores"
        )
    return Finding(name="cores", verdict="ok", found=found)


def check_memory() -> Finding:
    try:
        available = available_memory_bytes()
    except OSError as error:
        return Finding(name="memory", verdict="warn", found=f"unknown ({error})", advice="give --kv-cache-memory")
    verdict: Verdict = "ok" if available >= LEAST_MEMORY_BYTES else "warn"
    advice = "the default mesh wants about 3 GiB: lower --kv-cache-memory, or start --both 1"
    return Finding(name="memory", verdict=verdict, found=f"{available / GIB:.1f} GiB available", advice=advice)


def check_shared_memory() -> Finding:
    room = shared_memory_bytes()
    if room is None:
        return Finding(
            name="/dev/shm", verdict="warn", found="missing", advice="KV moves over tcp; mount a tmpfs there for the shm tier"
        )
    verdict: Verdict = "ok" if room >= LEAST_SHARED_MEMORY_BYTES else "warn"
    advice = "KV regions lie there: enlarge it (shm_size in compose, --shm-size in docker), or lower --kv-cache-memory"
    return Finding(name="/dev/shm", verdict=verdict, found=f"{room / GIB:.1f} GiB free", advice=advice)


def check_port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = "stop what listens there (perhaps a running mesh), or serve with --port"
            return Finding(name="port", verdict="warn", found=f"{port}: {error.strerror}", advice=advice)
    return Finding(name="port", verdict="ok", found=f"{port} is free")
