"""CPU time a token of the gateway's client side: `python -m tests.benchmarks.gateway_stream_cost [streams] [tokens]`.

The gateway (uvicorn, uvloop) runs in a process of its own on top of an in-memory mesh that makes one token a choice and turn
of the loop; raw socket clients in this process read it all. What is printed is the gateway process' CPU time, its mesh included;
the mesh's own share is measured apart and printed beside it.
"""

import asyncio
import json
import multiprocessing
import socket
import sys
import time
from multiprocessing.connection import Connection

import uvloop

from common.runtime.metrics import Metrics
from services.gateway.http.application import build_application
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.server import listen, serve_http
from tests.gateway_twin import MODEL, TwinMesh


async def _serve(listening: socket.socket, pipe: Connection) -> None:
    settings, stop = HttpSettings(), asyncio.Event()
    application = build_application(TwinMesh(), settings, Metrics())
    loop = asyncio.get_running_loop()
    last = time.process_time()

    def command() -> None:
        nonlocal last
        if pipe.recv() == "stop":
            stop.set()
        now = time.process_time()
        pipe.send(now - last)
        last = now

    loop.add_reader(pipe.fileno(), command)
    await serve_http(application, settings, sockets=[listening], stop=stop)


def _gateway_process(listening: socket.socket, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listening, pipe))


async def _read_stream(port: int, tokens: int) -> int:
    content = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "seed": 0, "max_tokens": tokens, "stream": True}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    events = 0
    while not (part := await reader.readuntil(b"\n\n")).endswith(b"[DONE]\n\n"):
        events += part.count(b"data: ")
    writer.close()
    return events


async def _mesh_alone(streams: int, tokens: int) -> float:
    """CPU time a token of the in-memory mesh itself."""
    from common.ports.generation import GenerationRequest
    from common.values.ids import RequestId
    from common.values.sampling import SamplingParameters

    async def drain(place: int) -> None:
        sampling = SamplingParameters(max_tokens=tokens, seed=0)
        request = GenerationRequest(request_id=RequestId(str(place)), model=MODEL, prompt=(5,), sampling=sampling)
        generation = await mesh.start(request)
        while await generation.next_events():
            pass

    mesh, begun = TwinMesh(), time.process_time()
    await asyncio.gather(*(drain(place) for place in range(streams)))
    return (time.process_time() - begun) / (streams * tokens)


async def _measure(pipe: Connection, port: int, streams: int, tokens: int) -> None:
    await asyncio.gather(*(_read_stream(port, 20) for _ in range(streams)))
    for _ in range(3):
        pipe.send("mark")
        pipe.recv()
        begun = time.perf_counter()
        events = sum(await asyncio.gather(*(_read_stream(port, tokens) for _ in range(streams))))
        wall = time.perf_counter() - begun
        pipe.send("mark")
        cost = pipe.recv() / (streams * tokens)
        mesh = await _mesh_alone(streams, tokens)
        print(
            f"{streams} streams x {tokens} tokens, {events} events: gateway process {cost * 1e6:.1f} µs CPU a token"
            f" (in-memory mesh alone {mesh * 1e6:.1f}), {streams * tokens / wall:,.0f} tokens/s"
        )


def main() -> None:
    streams, tokens = (int(argument) for argument in (sys.argv[1:] + ["64", "200"][len(sys.argv) - 1 :]))
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_gateway_process, args=(listening, theirs))
    process.start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure(ours, port, streams, tokens))
    ours.send("stop")
    process.join()


if __name__ == "__main__":
    main()
