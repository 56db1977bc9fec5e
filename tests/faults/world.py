"""The kinds of mesh that faults happen in."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`flags` are those of each worker. Answers have `tokens` tokens; the mix has a prompt of several hundred tokens where
    `long_prompts`. In a world of `two_hosts` the decode workers live in a network namespace of their own."""

    name: str
    flags: tuple[str, ...]
    tokens: int = 48
    long_prompts: bool = True
    two_hosts: bool = False


_ENGINE = ("--engine", "synthetic", "--synthetic-step-s", "0.02")
SYNTHETIC = World(name="synthetic", flags=(*_ENGINE, "--kv-cache-memory", "128MiB", "--max-model-len", "1536"))
SMALL_POOLS = World(name="small pools", flags=(*_ENGINE, "--kv-cache-memory", "49MiB", "--max-model-len", "1088"), tokens=280)
"""69 blocks of 16 tokens a worker: one sequence of the longest kind, and one block more."""
OVER_TCP = replace(SYNTHETIC, name="tcp tier", flags=(*SYNTHETIC.flags, "--kv-tiers", "tcp"))
OVER_UCX = replace(SYNTHETIC, name="ucx tier", flags=(*SYNTHETIC.flags, "--kv-tiers", "ucx"))
TWO_HOSTS = replace(OVER_TCP, name="two hosts", long_prompts=False, two_hosts=True)
REAL = World(name="real model", flags=("--kv-cache-memory", "512MiB", "--max-model-len", "2048", "--dtype", "float32"))
