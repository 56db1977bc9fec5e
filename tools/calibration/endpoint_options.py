"""Which server is calibrated from outside, and how much load it may get."""

import argparse
from dataclasses import dataclass

from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import Endpoint, parse_endpoint
from tools.bench_load_options import api_key


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    endpoint: Endpoint
    max_requests: int
    max_concurrency: int
    max_prompt: int
    timeout_s: float
    seed: int
    is_dry_run: bool


def endpoint_options(given: argparse.Namespace) -> EndpointOptions:
    """Raises BenchRefused."""
    if min(given.max_requests, given.max_concurrency, given.max_prompt) < 1 or not given.timeout > 0.0:
        raise BenchRefused("--max-requests, --max-concurrency, --max-prompt and --timeout are above 0")
    endpoint = parse_endpoint(given.endpoint, api=given.api, model=given.model or "", api_key=api_key(given.api_key_file), extra={})
    return EndpointOptions(
        endpoint=endpoint,
        max_requests=given.max_requests,
        max_concurrency=given.max_concurrency,
        max_prompt=given.max_prompt,
        timeout_s=given.timeout,
        seed=given.seed,
        is_dry_run=given.dry_run,
    )
