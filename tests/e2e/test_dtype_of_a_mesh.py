"""`--dtype auto` in a real mesh: the second worker takes the first one's, and one that was told another pairs with nobody."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from tests.e2e.real_mesh import make_mesh, mesh_client
from tests.servers import running_nats, running_valkey
from tests.tiny_models import LLAMA_CONFIG

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]
QUICK = ("--engine", "synthetic", "--load-format", "dummy", "--kv-cache-memory", "16MiB", "--max-model-len", "256")


async def test_the_first_worker_fixes_the_dtype_and_a_different_one_is_shown(tmp_path: Path) -> None:
    tiny_config = str(tmp_path / "tiny.json")
    Path(tiny_config).write_text(json.dumps(LLAMA_CONFIG), encoding="utf-8")
    async with running_nats() as nats, running_valkey() as valkey, contextlib.AsyncExitStack() as closing:
        mesh = make_mesh(nats.url, valkey.url)
        closing.callback(mesh.stop)
        client = await closing.enter_async_context(mesh_client(mesh))
        mesh.start_worker("first", "prefill", tiny_config, *QUICK, "--dtype", "bfloat16")
        await mesh.settled()
        mesh.start_worker("second", "decode", tiny_config, *QUICK)
        await mesh.settled()
        mesh.start_worker("third", "decode", tiny_config, *QUICK, "--dtype", "float32")
        snapshots = {}
        async with asyncio.timeout(60):
            while len(snapshots.get("third", ())) < 1:
                await asyncio.sleep(0.05)
                snapshots = {str(s.worker): s.unpaired for s in client.core.registry.all() if s.state == "ready"}
        dtypes = {str(s.worker): s.fingerprint.dtype for s in client.core.registry.all()}
        assert dtypes == {"first": "bfloat16", "second": "bfloat16", "third": "float32"}
        assert snapshots["third"]["first"] == "dtype"
        assert "first: dtype" in client.readiness()["worker third"]
        assert "dtype_differs" in mesh.log("third")
        assert "dtype_chosen" in mesh.log("second")
        assert "the mesh computes this model in it" in mesh.log("second")
