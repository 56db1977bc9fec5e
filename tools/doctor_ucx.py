"""Which ways to move KV come up here. Tried in a process of its own: a broken UCX must not take the doctor with it."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from common.values.kv_layout import KvLayout
from tools.doctor_checks import Finding

TRY_TIMEOUT_S = 60.0
BETTER_TIERS = ("shm", "ucx")


def ucx_findings() -> list[Finding]:
    """A line about the library, and one about each tier."""
    root = Path(__file__).resolve().parent.parent
    try:
        tried = subprocess.run(
            [sys.executable, "-m", "tools.doctor_ucx"], capture_output=True, text=True, timeout=TRY_TIMEOUT_S, check=False, cwd=root
        )
    except subprocess.TimeoutExpired:
        return [Finding(name="ucx", verdict="fail", found=f"hangs for {TRY_TIMEOUT_S:.0f} s", advice="serve with --kv-tiers tcp")]
    lines = tried.stdout.strip().splitlines()
    if tried.returncode != 0 or not lines:
        reason = (tried.stderr.strip().splitlines() or [f"exit status {tried.returncode}"])[-1]
        return [Finding(name="ucx", verdict="fail", found=reason, advice="serve with --kv-tiers tcp")]
    result = json.loads(lines[-1])
    return [_finding(str(tier), reason) for tier, reason in result.items()]


def _finding(tier: str, reason: str | None) -> Finding:
    if reason is None:
        return Finding(name=f"tier {tier}", verdict="ok", found="comes up")
    advice = "slower tiers serve; pip install libucx-cu12, or the system's UCX (Debian: libucx0)" if tier in BETTER_TIERS else ""
    return Finding(name=f"tier {tier}", verdict="warn" if tier in BETTER_TIERS else "fail", found=reason, advice=advice)


async def try_tiers() -> dict[str, str | None]:
    """Tier → None where it comes up, else why not."""
    from common.adapters.kv_transport import NETWORK_TIERS, UcxOrTcpTransport

    transport = UcxOrTcpTransport(host="127.0.0.1")
    await transport.start(KvLayout(layers=1, kv_heads=1, head_dim=16), 4)
    try:
        return {tier: None if tier in transport.tiers else transport.unavailable.get(tier, "unknown") for tier in NETWORK_TIERS}
    finally:
        await transport.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(try_tiers())))
