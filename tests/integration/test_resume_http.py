"""Coming back to a request over HTTP: at every event, at another gateway, after the end, by `Idempotency-Key`; never as another."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from common.engine.synthetic import StepTimes
from common.protocol.request_record import parse_record
from common.values.ids import RequestId
from services.gateway.mesh_client import LiveMesh
from tests.gateway_server import RunningGateway, chat, completion, gateway
from tests.gateway_twin import tiny_card
from tests.mesh_in_memory import MeshInMemory, running_mesh

ALICE, MALLORY = {"authorization": "Bearer alice"}, {"authorization": "Bearer mallory"}
RESUME = {**ALICE, "x-segue-resume": "1"}
Headers = Mapping[str, str]


@dataclass
class Two:
    mesh: MeshInMemory
    first: RunningGateway
    second: RunningGateway
    first_mesh: LiveMesh
    second_mesh: LiveMesh

    def first_dies(self) -> None:
        self.mesh.gateway_brokers["g0"].disconnect()

    def generated(self) -> int:
        """Tokens that workers have made."""
        return sum(worker.service.core.counters.tokens for worker in self.mesh.workers.values())

    async def ended(self, request_id: str) -> None:
        async with asyncio.timeout(10):
            while True:
                fields = await self.mesh.store.read(self.mesh.names.request_key(RequestId(request_id)))
                if fields is not None and parse_record(fields).state != "running":
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def two(step_s: float = 0.005) -> AsyncIterator[Two]:
    async with running_mesh() as mesh:
        for name, role in (("p0", "prefill"), ("d0", "decode")):
            await mesh.start_worker(name, role, times=StepTimes(fixed=step_s), model=tiny_card(max_model_len=256))  # type: ignore[arg-type]
        meshes = [await mesh.start_gateway(name) for name in ("g0", "g1")]
        for each in meshes:
            await mesh.settled(each)
        keys = {"api_keys": ("alice", "mallory")}
        async with gateway(meshes[0], **keys) as first, gateway(meshes[1], **keys) as second:  # type: ignore[arg-type]
            yield Two(mesh, first, second, *meshes)


def body(**fields: Any) -> dict[str, Any]:
    return chat("hello", **{"stream": True, "max_tokens": 24, "seed": 5, "ignore_eos": True, **fields})


def events(text: str) -> list[str]:
    return [block + "\n\n" for block in text.split("\n\n") if block and not block.startswith(":")]


def event_id(event: str) -> str | None:
    found = re.match(r"id: (\S+)\n", event)
    return found[1] if found else None


async def begin(running: RunningGateway, wanted: dict[str, Any], count: int, headers: Headers = RESUME) -> tuple[str, list[str]]:
    """Read some events of a stream, then leave. Returns its id and the events."""
    text = ""
    async with running.client.stream("POST", "/v1/chat/completions", json=wanted, headers=dict(headers)) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for piece in answer.aiter_text():
            text += piece
            if len(events(text.rpartition("\n\n")[0])) >= count:
                break
        return answer.headers["x-segue-request-id"], events(text.rpartition("\n\n")[0] + "\n\n")


async def resume(running: RunningGateway, request_id: str, last: str | None, headers: Headers = ALICE) -> httpx.Response:
    more = {} if last is None else {"last-event-id": last}
    return await running.client.get(f"/v1/streams/{request_id}", headers={**headers, **more})


def shape(text: str) -> str:
    """A stream without what names it."""
    return re.sub(r'"id":"[^"]+"|"created":\d+', "", text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}},
        {"ignore_eos": False, "temperature": 0.7},
    ],
)
async def test_an_ended_stream_can_be_resumed_at_every_event_at_any_gateway(fields: dict[str, Any]) -> None:
    async with two(0.0) as here:
        answer = await here.first.client.post("/v1/chat/completions", json=body(**fields), headers=RESUME)
        request_id, whole = answer.headers["x-segue-request-id"], events(answer.text)
        assert whole[-1] == "data: [DONE]\n\n"
        await here.ended(request_id)
        assert events((await resume(here.second, request_id, None)).text) == whole
        made = here.generated()
        for place, event in enumerate(whole):
            if (last := event_id(event)) is not None:
                assert events((await resume(here.second, request_id, last)).text) == whole[place + 1 :]
        assert here.generated() == made


async def test_stop_strings_and_several_choices_are_regenerated_as_they_were() -> None:
    async with two(0.0) as here:
        plain = json.loads((await here.first.client.post("/v1/chat/completions", json=body(stream=False), headers=ALICE)).text)
        text = plain["choices"][0]["message"]["content"]
        wanted = body(stop=[text[6:9]], n=3, stream_options={"include_usage": True})
        answer = await here.first.client.post("/v1/chat/completions", json=wanted, headers=RESUME)
        request_id, whole = answer.headers["x-segue-request-id"], events(answer.text)
        await here.ended(request_id)
        again = events((await resume(here.second, request_id, None)).text)
        assert by_choice(again) == by_choice(whole)
        assert again[-2] == whole[-2], "usage"
        ids = [event_id(event) for event in whole]
        middle = ids[len(ids) // 2]
        rest = by_choice(events((await resume(here.second, request_id, middle)).text))
        assert middle is not None
        had = [int(part) for part in middle.split(".")]
        for choice, seen in by_choice(whole).items():
            assert rest.get(choice, {}) == {consumed: delta for consumed, delta in seen.items() if consumed > had[choice]}


def by_choice(stream: list[str]) -> dict[int, dict[int, str]]:
    """By choice: what each consumed count brought."""
    found: dict[int, dict[int, str]] = {}
    for event in stream:
        ident = event_id(event)
        if ident is None:
            continue
        [choice] = json.loads(event.partition("data: ")[2])["choices"]
        found.setdefault(choice["index"], {})[int(ident.split(".")[choice["index"]])] = json.dumps(choice)
    return found


async def test_a_stream_goes_on_at_the_other_gateway_after_the_first_one_died() -> None:
    async with two(0.02) as here:
        undisturbed = await here.second.client.post("/v1/chat/completions", json=body(max_tokens=80), headers=ALICE)
        request_id, begun = await begin(here.first, body(max_tokens=80), 10)
        here.first_dies()
        rest = await resume(here.second, request_id, event_id(begun[-1]))
        assert shape("".join(begun + events(rest.text))) == shape("".join(events(undisturbed.text)))
        assert here.second_mesh.core.counters["adopted"] == 1
        await here.mesh.quiet()


async def test_a_plain_stream_can_be_resumed_after_its_gateways_death_as_well() -> None:
    async with two(0.02) as here:
        undisturbed = await here.second.client.post("/v1/chat/completions", json=body(max_tokens=80), headers=ALICE)
        async with here.first.client.stream("POST", "/v1/chat/completions", json=body(max_tokens=80), headers=ALICE) as answer:
            request_id = answer.headers["x-segue-request-id"]
            here.first_dies()
            whole = await resume(here.second, request_id, None)
        assert shape("".join(events(whole.text))) == shape("".join(events(undisturbed.text)))


async def test_one_repeat_with_the_key_after_its_gateways_death_gives_the_whole_stream() -> None:
    async with two(0.02) as here:
        keyed = {**ALICE, "idempotency-key": "order-17"}
        undisturbed = await here.second.client.post("/v1/chat/completions", json=body(max_tokens=60), headers=ALICE)
        before = here.generated()
        await begin(here.first, body(max_tokens=60), 10, keyed)
        here.first_dies()
        whole = await here.second.client.post("/v1/chat/completions", json=body(max_tokens=60), headers=keyed)
        assert shape("".join(events(whole.text))) == shape("".join(events(undisturbed.text)))
        await here.mesh.quiet()
        assert here.generated() - before == 60


@pytest.mark.parametrize("stream", [True, False])
async def test_a_repeated_request_is_generated_once(stream: bool) -> None:
    async with two(0.005) as here:
        wanted, keyed = body(stream=stream), {**ALICE, "idempotency-key": "k1"}
        asked = [here.first.client.post("/v1/chat/completions", json=wanted, headers=keyed) for _ in range(5)]
        texts = {"".join(events(answer.text)) if stream else answer.text for answer in await asyncio.gather(*asked)}
        assert len(texts) == 1
        request_id = json.loads(re.search(r"\{.*\}", texts.copy().pop())[0].splitlines()[0])["id"]  # type: ignore[index]
        await here.ended(request_id)
        later = await here.second.client.post("/v1/chat/completions", json=wanted, headers=keyed)
        assert {"".join(events(later.text)) if stream else later.text} == texts
        assert here.generated() == 24
        others = await here.second.client.post("/v1/chat/completions", json=wanted, headers={**keyed, **MALLORY})
        assert request_id not in others.text
        assert here.generated() == 48
        clash = await here.second.client.post("/v1/chat/completions", json=body(stream=stream, max_tokens=9), headers=keyed)
        assert (clash.status_code, clash.json()["error"]["code"]) == (422, "idempotency_key_reused")
        here.mesh.store.set_available(False)
        away = await here.second.client.post("/v1/chat/completions", json=wanted, headers={**ALICE, "idempotency-key": "k2"})
        assert away.status_code == 503
        assert "retry-after" in away.headers
        here.mesh.store.set_available(True)


async def test_at_two_gateways_at_once_it_is_generated_once_and_one_of_them_has_it() -> None:
    """The later one takes the request over; the earlier one says so, where it had not finished."""
    async with two(0.01) as here:
        keyed = {**ALICE, "idempotency-key": "k1"}
        both = [running.client.post("/v1/chat/completions", json=body(), headers=keyed) for running in (here.first, here.second)]
        answers = await asyncio.gather(*both)
        whole = [answer for answer in answers if '"error"' not in answer.text]
        assert whole
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in whole)
        for answer in answers:
            assert answer in whole or '"code":"moved"' in answer.text
        again = await here.first.client.post("/v1/chat/completions", json=body(), headers=keyed)
        assert events(again.text) == events(whole[0].text)
        await here.mesh.quiet()
        assert here.generated() == 24


async def test_a_key_whose_request_was_refused_is_free_again() -> None:
    async with two(0.0) as here:
        keyed = {**ALICE, "idempotency-key": "k1"}
        here.mesh.gateway_brokers["g0"].disconnect()
        refused = await here.first.client.post("/v1/chat/completions", json=body(), headers=keyed)
        assert refused.status_code == 503
        fine = await here.second.client.post("/v1/chat/completions", json=body(), headers=keyed)
        assert fine.status_code == 200
        assert fine.text.endswith("data: [DONE]\n\n")


async def test_several_prompts_come_back_as_one_answer() -> None:
    async with two(0.005) as here:
        wanted = completion(["a b", "c d e"], max_tokens=12, echo=True, ignore_eos=True)
        keyed = {**ALICE, "idempotency-key": "k1"}
        answer = await here.first.client.post("/v1/completions", json=wanted, headers=keyed)
        for part in ("", "-1"):
            await here.ended(answer.json()["id"] + part)
        again = await here.second.client.post("/v1/completions", json=wanted, headers=keyed)
        assert again.text == answer.text
        stream = await resume(here.second, answer.json()["id"], None)
        assert stream.text.endswith("data: [DONE]\n\n")


async def test_what_is_wrong_is_said() -> None:
    async with two(0.0) as here:
        answer = await here.first.client.post("/v1/chat/completions", json=body(), headers=RESUME)
        request_id = answer.headers["x-segue-request-id"]
        await here.ended(request_id)
        for headers, name, last, expected in (
            (MALLORY, request_id, None, (404, "stream_not_found")),
            (ALICE, "chatcmpl-none", None, (404, "stream_not_found")),
            (ALICE, request_id, "x", (400, "invalid_request")),
            (ALICE, request_id, "1.2", (400, "invalid_request")),
            ({}, request_id, None, (401, "invalid_api_key")),
        ):
            for running in (here.first, here.second):
                got = await resume(running, name, last, headers)
                assert (got.status_code, got.json()["error"]["code"]) == expected
        for header, value in (("x-segue-resume", "yes"), ("idempotency-key", ""), ("idempotency-key", "k" * 256)):
            got = await here.first.client.post("/v1/chat/completions", json=body(), headers={**ALICE, header: value})
            assert got.status_code == 400
        by_query = await here.first.client.get(f"/v1/streams/{request_id}?last_event_id=24", headers=ALICE)
        assert events(by_query.text) == ["data: [DONE]\n\n"]


async def test_a_websocket_session_lives_on_and_is_resumed_elsewhere() -> None:
    async with two(0.02) as here:
        begin_frame = {**body(max_tokens=80), "type": "generate", "id": "a"}
        texts: list[str] = []
        async with connect(here.first.websocket_url, additional_headers=ALICE) as socket:
            await socket.send(json.dumps(begin_frame))
            accepted = json.loads(await socket.recv())
            while len(texts) < 8:
                frame = json.loads(await socket.recv())
                texts.append(frame["text"])
        last = frame["index"] + 1
        async with connect(here.second.websocket_url, additional_headers=ALICE) as socket:
            again = {"type": "resume", "id": "b", "request_id": accepted["request_id"], "last_event_id": str(last)}
            await socket.send(json.dumps(again))
            assert json.loads(await socket.recv()) == {"type": "accepted", "id": "b", "request_id": accepted["request_id"]}
            while (frame := json.loads(await socket.recv()))["type"] == "token":
                assert frame["index"] >= last
                texts.append(frame["text"])
        assert frame["type"] == "done"
        assert frame["usage"]["completion_tokens"] == 80
        whole = await here.second.client.post("/v1/chat/completions", json=body(stream=False, max_tokens=80), headers=ALICE)
        assert "".join(texts) == whole.json()["choices"][0]["message"]["content"]
        await here.mesh.quiet()


async def test_a_cancelled_websocket_request_does_not_linger() -> None:
    async with two(0.02) as here, connect(here.first.websocket_url, additional_headers=ALICE) as socket:
        await socket.send(json.dumps({**body(max_tokens=150), "type": "generate", "id": "a"}))
        await socket.recv()
        await socket.send(json.dumps({"type": "cancel", "id": "a"}))
        while json.loads(await socket.recv())["type"] != "done":
            pass
        assert here.first_mesh.core.active == 0
        await here.mesh.quiet()
