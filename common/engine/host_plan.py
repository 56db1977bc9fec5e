"""The memory plan of this host, now: `memory_plan`'s arithmetic on the model's files and the memory that there is.

Needs no torch, so that the command which starts all workers of a host plans once for all of them, and hands each its share as
`--kv-cache-memory`, `--max-model-len` and `--max-num-seqs`. A worker that is started by hand plans for itself.
"""

from common.engine.host_memory import available_memory_bytes, shared_memory_bytes
from common.engine.memory_plan import MemoryPlan, MemoryRequest, kv_layout, plan_memory, weight_demand
from common.engine.model_files import ModelFolder
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype


def plan_on_this_host(
    folder: ModelFolder,
    request: MemoryRequest,
    *,
    dtype: KvDtype,
    block_size: int = 16,
    workers: int = 1,
    region_in_shared_memory: bool = True,
) -> MemoryPlan:
    """Plan for `workers` workers of this model on the CPU. Raises ModelError, with the sum, for what cannot fit."""
    config = folder.config()
    try:
        available = available_memory_bytes()
    except OSError as error:
        raise ModelError(f"cannot find out how much memory this machine has: {error}") from error
    return plan_memory(
        config,
        kv_layout(config, dtype, block_size),
        weight_demand(config, folder.tensor_headers(), dtype, mapped=True),
        request,
        available_bytes=available,
        workers=workers,
        shared_memory_bytes=shared_memory_bytes() if region_in_shared_memory else None,
    )
