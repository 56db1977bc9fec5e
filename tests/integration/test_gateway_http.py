"""The HTTP routes over real connections, with raw bytes where a client library would be too polite."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from common.values.errors import BrokerUnavailable, Overloaded, RequestFailed, SettingsError
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.server import listen
from tests.gateway_server import chat, completion, eventually, gateway, parse_sse, quiet, shown
from tests.gateway_twin import MODEL, Script, TwinMesh, saying_tokens, tiny_card, tiny_tokenizer

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


def said(tokens: int, *, seed: int = 0) -> str:
    """What the twin says in so many tokens."""
    all_tokens = saying_tokens(seed)
    return str(tiny_tokenizer().decode([all_tokens[index % len(all_tokens)] for index in range(tokens)]))


async def test_chat_whole_and_streamed_say_the_same() -> None:
    async with gateway() as running:
        whole = (await running.client.post(CHAT, json=chat(seed=1, max_tokens=60))).json()
        streamed = await running.client.post(
            CHAT, json=chat(seed=1, max_tokens=60, stream=True, stream_options={"include_usage": True})
        )
        events, done = parse_sse(streamed.text)
        choices = [event.data["choices"] for event in events]
        assert done
        assert choices[-1] == []
        assert "".join(choice[0]["delta"]["content"] for choice in choices[:-1]) == whole["choices"][0]["message"]["content"]
        assert whole["choices"][0]["message"]["content"] == said(60, seed=1)
        assert events[-1].data["usage"] == whole["usage"]
        assert whole["usage"]["completion_tokens"] == 60
        assert choices[0][0]["delta"]["role"] == "assistant"
        assert [choice[0]["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 2) + ["length"]
        assert all(event.data["id"] == events[0].data["id"] for event in events)
        await quiet(running.mesh)


async def test_events_do_not_depend_on_how_tokens_were_cut_into_batches() -> None:
    bodies = []
    for batch in (1, 7):
        async with gateway(TwinMesh(script=Script(batch=batch))) as running:
            answer = await running.client.post(COMPLETION, json=completion(seed=1, n=2, max_tokens=50, stream=True))
            events, _ = parse_sse(answer.text)
            bodies.append([(event.data["choices"], event.id) for event in events])
    one, seven = ([choices for choices, _ in body] for body in bodies)
    for choice in (0, 1):
        texts = [[entry for [entry] in body if entry["index"] == choice] for body in (one, seven)]
        assert texts[0] == texts[1]
    assert bodies[0][-1][1] == bodies[1][-1][1] == "50.50"


async def test_event_ids_count_tokens() -> None:
    async with gateway(TwinMesh(script=Script(eos_at=9))) as running:
        events, _ = parse_sse((await running.client.post(CHAT, json=chat(stream=True))).text)
        ids = [int(event.id) for event in events]
        assert ids == sorted(set(ids))
        assert ids[-1] == 10, "the end-of-sequence token counts and has no text"
        assert events[-1].data["choices"][0]["delta"]["content"] == ""
        assert events[-1].data["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("stop", "shown"), [("STOP", "one two three four five six seven "), (["q", "four fi"], "one two three ")])
async def test_stop_strings_end_a_stream(stop: object, shown: str) -> None:
    async with gateway() as running:
        body = chat(seed=2, stop=stop, max_tokens=500, stream=True, stream_options={"include_usage": True})
        events, done = parse_sse((await running.client.post(CHAT, json=body)).text)
        *chunks, usage = events
        assert done
        assert "".join(event.data["choices"][0]["delta"]["content"] for event in chunks) == shown
        assert chunks[-1].data["choices"][0]["finish_reason"] == "stop"
        # Only the tokens up to the one that completes the stop string count.
        whole_text = shown + ("STOP" if stop == "STOP" else "four fi")
        counted = usage.data["usage"]["completion_tokens"]
        assert said(counted - 1, seed=2) in whole_text
        assert whole_text in said(counted, seed=2)
        await quiet(running.mesh)
        assert len(running.mesh.cancelled) == 1


async def test_a_choice_that_stopped_is_cancelled_while_the_others_go_on() -> None:
    async with gateway() as running:
        answer = (await running.client.post(COMPLETION, json=completion(seed=1, n=2, stop=["two"], max_tokens=300))).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "stop"]
        assert answer["choices"][1]["text"] == "one "
        assert answer["usage"]["completion_tokens"] == running.mesh.made < 320


async def test_a_client_that_leaves_within_its_body_is_forgotten() -> None:
    async with gateway(max_concurrent_requests=1) as running:
        _, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(raw_post(chat())[:-5])
        await writer.drain()
        writer.close()
        await shown(running, 'status="499"} 1')
        assert (await running.client.post(CHAT, json=chat())).status_code == 200


async def test_stop_at_token_zero_and_included_stop() -> None:
    async with gateway() as running:
        first = (await running.client.post(COMPLETION, json=completion(seed=2, stop=["o"]))).json()
        assert first["choices"][0]["text"] == ""
        assert first["choices"][0]["finish_reason"] == "stop"
        assert first["usage"]["completion_tokens"] == 1
        body = completion(seed=2, stop=["two"], include_stop_str_in_output=True)
        assert (await running.client.post(COMPLETION, json=body)).json()["choices"][0]["text"] == "one two"
        body = completion(seed=2, stop=["o"], min_tokens=5, max_tokens=30)
        answer = (await running.client.post(COMPLETION, json=body)).json()
        assert answer["usage"]["completion_tokens"] > 5


async def test_several_prompts_and_choices_are_numbered_through() -> None:
    async with gateway() as running:
        ids = tiny_tokenizer().encode("hello").ids
        for prompts, count in ((["a", "b", "c"], 3), ([ids, ids], 2), (ids, 1), ("x", 1)):
            answer = (await running.client.post(COMPLETION, json=completion(prompts, n=2))).json()
            assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
            assert [choice["text"] for choice in answer["choices"]] == [said(20, seed=place % 2) for place in range(2 * count)]
            assert answer["usage"]["completion_tokens"] == 40 * count
        streamed = await running.client.post(COMPLETION, json=completion(["a", "b", "c"], n=2, stream=True))
        events, done = parse_sse(streamed.text)
        texts = dict.fromkeys(range(6), "")
        for event in events:
            entry = event.data["choices"][0]
            texts[entry["index"]] += entry["text"]
        assert done
        assert list(texts.values()) == [said(20, seed=place % 2) for place in range(6)]
        assert events[-1].id == ".".join(["20"] * 6)
        await quiet(running.mesh)


async def test_echo_with_and_without_logprobs() -> None:
    async with gateway() as running:
        whole = (await running.client.post(COMPLETION, json=completion("Once: ", echo=True))).json()
        assert whole["choices"][0]["text"] == "Once: " + said(20)
        events, _ = parse_sse((await running.client.post(COMPLETION, json=completion("Once: ", echo=True, stream=True))).text)
        assert "".join(event.data["choices"][0]["text"] for event in events) == "Once: " + said(20)
        scored = (await running.client.post(COMPLETION, json=completion("Once: ", echo=True, logprobs=1, max_tokens=3))).json()
        choice = scored["choices"][0]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert "".join(logprobs["tokens"]) == choice["text"] == "Once: " + said(3)
        assert [
            choice["text"][offset:].startswith(token)
            for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        ]
        assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == len(logprobs["token_logprobs"])
        assert "prompt_logprobs" not in choice


async def test_prompt_logprobs_have_one_entry_a_position() -> None:
    async with gateway() as running:
        answer = (await running.client.post(CHAT, json=chat(prompt_logprobs=2))).json()
        prompt = running.mesh.requests[-1].prompt
        assert answer["prompt_logprobs"][0] is None
        assert len(answer["prompt_logprobs"]) == len(prompt) == answer["usage"]["prompt_tokens"]
        assert all(str(token) in entry for token, entry in zip(prompt[1:], answer["prompt_logprobs"][1:], strict=True))
        answer = (await running.client.post(COMPLETION, json=completion(["a b", "c"], prompt_logprobs=0))).json()
        assert [len(choice["prompt_logprobs"]) for choice in answer["choices"]] == [len(r.prompt) for r in running.mesh.requests[-2:]]


BAD_BODIES: list[tuple[str, Any, str | None, str]] = [
    (CHAT, b"{", None, "JSON"),
    (CHAT, b"[]", None, "object"),
    (CHAT, b'{"model":"\xff"}', None, "JSON"),
    (CHAT, b'{"chat_template_kwargs": {"a":' + b"[" * 5000, None, ""),
    (CHAT, {"messages": []}, "model", "model"),
    (CHAT, {"model": MODEL}, "messages", "messages"),
    (CHAT, chat(messages=[]), "messages", "at least one"),
    (CHAT, chat(messages=[{"role": "user", "content": 3}]), "messages[0].content", "int"),
    (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content", "content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content", "image_url"),
    (CHAT, chat(max_tokens="ten"), "max_tokens", "int"),
    (CHAT, chat(max_tokens=0), "max_tokens", "at least 1"),
    (CHAT, chat(temperature=-1), "temperature", "between"),
    (CHAT, chat(top_p=0), "top_p", "above 0"),
    (CHAT, chat(n=0), "n", "at least 1"),
    (CHAT, chat(n=1000), "n", "at most"),
    (CHAT, chat(best_of=4), "best_of", "best_of"),
    (CHAT, chat(stop=["a"] * 17), "stop", "16"),
    (CHAT, chat(stop=""), "stop", "characters"),
    (CHAT, chat(logit_bias={"x": 1}), "logit_bias", "ids"),
    (CHAT, chat(logit_bias={"99999": 1}), "logit_bias", "vocabulary"),
    (CHAT, chat(top_logprobs=2), "top_logprobs", "logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
    (CHAT, chat(tool_choice="required"), "tool_choice", "forced"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format", "json_object"),
    (CHAT, chat(modalities=["audio"]), "modalities", "text"),
    (CHAT, chat(guided_regex="a+"), "guided_regex", "not supported"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "streams"),
    (CHAT, chat(content="\ud800"), None, ""),
    (CHAT, chat("word " * 20_000), None, "4096"),
    (CHAT, chat(max_tokens=5000), "max_tokens", "4096"),
    (COMPLETION, completion([1, "a"]), "prompt", "mixes"),
    (COMPLETION, completion([]), "prompt", "at least one"),
    (COMPLETION, completion(""), "prompt", "at least one"),
    (COMPLETION, completion([99999]), "prompt", "vocabulary"),
    (COMPLETION, completion([1.5]), "prompt[0]", "float"),
    (COMPLETION, completion(suffix="x"), "suffix", "not supported"),
    (COMPLETION, completion(prompt_logprobs=1, stream=True), "prompt_logprobs", "streamed"),
]


async def test_a_bad_body_gets_a_400_that_names_the_field() -> None:
    async with gateway() as running:
        for path, body, param, says in BAD_BODIES:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await running.client.post(path, content=content, headers={"content-type": "application/json"})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), (body, error)
            assert says in error["message"], body
            assert error["type"] == "invalid_request_error"
        assert not running.mesh.requests


async def test_nulls_and_unknown_fields_are_as_if_absent() -> None:
    async with gateway() as running:
        fields: dict[str, Any] = {
            "temperature": None,
            "stop": None,
            "n": None,
            "tools": None,
            "something_new": {"a": 1},
            "best_of": 1,
            "top_k": -1,
        }
        assert (await running.client.post(CHAT, json=chat(**fields))).status_code == 200
        sampling = running.mesh.requests[-1].sampling
        assert (sampling.temperature, sampling.top_k) == (1.0, 0)


async def test_max_tokens_defaults_to_the_room_and_a_seed_is_drawn() -> None:
    async with gateway(TwinMesh(script=Script(eos_at=1))) as running:
        for _ in range(2):
            body = chat(max_tokens=None, seed=None)
            assert (await running.client.post(CHAT, json=body)).json()["usage"]["completion_tokens"] == 2
        first, second = running.mesh.requests
        assert first.sampling.max_tokens == 4096 - len(first.prompt)
        assert first.sampling.seed != second.sampling.seed


async def test_other_statuses_have_the_error_object_too() -> None:
    async with gateway(max_body_bytes=5000) as running:
        client = running.client
        answers = {
            404: await client.get("/nowhere"),
            405: await client.get(CHAT),
            415: await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}),
            413: await client.post(CHAT, json=chat("x" * 6000)),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answers[405].headers["allow"] == "POST"
        unknown = await client.post(CHAT, json=chat(model="gpt-9"))
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert MODEL in unknown.json()["error"]["message"]
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_a_chunked_body_is_bounded_too() -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    async with gateway(max_body_bytes=5000) as running:
        answer = await running.client.post(CHAT, content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413


async def test_refusals_of_the_mesh() -> None:
    mesh = TwinMesh()
    async with gateway(mesh) as running:
        for refusal, status, code in (
            (Overloaded("queue is full", retry_after_s=7.2), 429, "overloaded"),
            (BrokerUnavailable("broker away"), 503, "broker_unavailable"),
            (RequestFailed("poisoned", code="request_poisoned"), 500, "request_poisoned"),
        ):
            mesh.script.refuse = refusal
            for stream in (False, True):
                answer = await running.client.post(CHAT, json=chat(stream=stream))
                assert answer.status_code == status
                assert answer.json()["error"]["code"] == code
                assert answer.headers.get("retry-after") == {429: "7", 503: "1"}.get(status)


async def test_models_health_and_readiness() -> None:
    mesh = TwinMesh(served=(tiny_card(), tiny_card(name="other")))
    async with gateway(mesh) as running:
        client = running.client
        listed = (await client.get("/v1/models")).json()
        assert [entry["id"] for entry in listed["data"]] == [MODEL, "other"]
        assert (await client.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
        assert (await client.get("/v1/models/none")).json()["error"]["code"] == "model_not_found"
        assert (await client.get("/health")).status_code == 200
        assert (await client.head("/health")).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        mesh.not_ready["broker"] = "not connected"
        not_ready = await client.get("/readyz")
        assert (not_ready.status_code, not_ready.json()) == (503, {"status": "not_ready"})


async def test_keys_are_asked_for_everywhere_but_health() -> None:
    async with gateway(api_keys=("secret-1", "secret-2")) as running:
        client = running.client
        for path in ("/metrics", "/v1/models", "/nowhere"):
            assert (await client.get(path)).status_code == 401
        for bad in ("Bearer wrong", "Basic secret-1", "Bearer", "secret-1"):
            answer = await client.post(CHAT, json=chat(), headers={"authorization": bad})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("secret-1", "secret-2"):
            assert (await client.get("/metrics", headers={"authorization": f"Bearer {key}"})).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_metrics_count_requests_and_tokens() -> None:
    async with gateway() as running:
        await running.client.post(CHAT, json=chat(max_tokens=5))
        await running.client.post(CHAT, json=chat(max_tokens=5, stream=True, n=2))
        await running.client.get("/nowhere")
        await shown(running, 'outcome="finished"} 2')
        text = (await running.client.get("/metrics")).text
        assert f'segue_completion_tokens_total{{model="{MODEL}"}} 15' in text
        assert f'segue_requests_total{{model="{MODEL}",kind="chat",outcome="finished"}} 2' in text
        assert f'segue_time_to_first_token_seconds_count{{model="{MODEL}"}} 2' in text
        assert f'segue_inter_token_latency_seconds_count{{model="{MODEL}"}} 12' in text
        assert "segue_requests_running 0" in text
        assert 'segue_http_responses_total{route="other",status="404"} 1' in text


async def test_a_failure_before_the_first_token_is_an_http_error() -> None:
    async with gateway(TwinMesh(script=Script(fail_at=0))) as running:
        for stream in (False, True):
            answer = await running.client.post(CHAT, json=chat(stream=stream))
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "worker_lost"


async def test_a_failure_after_the_first_token_is_the_streams_last_event() -> None:
    async with gateway(TwinMesh(script=Script(fail_at=5))) as running:
        answer = await running.client.post(CHAT, json=chat(stream=True))
        events, done = parse_sse(answer.text)
        assert answer.status_code == 200
        assert done
        assert events[-1].data["error"]["code"] == "worker_lost"
        assert events[-2].id == "5"
        await quiet(running.mesh)
        await shown(running, 'outcome="failed"} 1')


async def test_the_200_and_pings_fill_silence() -> None:
    gate = asyncio.Event()
    async with gateway(TwinMesh(script=Script(gate=gate)), sse_keepalive_s=0.05) as running:
        async with running.client.stream("POST", CHAT, json=chat(stream=True)) as answer:
            assert answer.status_code == 200, "before any token"
            pings, text = 0, ""
            async for chunk in answer.aiter_text():
                text += chunk
                pings += chunk.count(": ping")
                if pings == 3:
                    gate.set()
        events, done = parse_sse(text)
        assert done
        assert "".join(event.data["choices"][0]["delta"]["content"] for event in events) == said(20)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold_after", [0, 3])
async def test_a_client_that_leaves_frees_everything(stream: bool, hold_after: int) -> None:
    async with gateway(TwinMesh(script=Script(hold_after=hold_after))) as running:
        reader, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(raw_post(chat(stream=stream, n=2)))
        if stream and hold_after:
            await reader.readuntil(b"id: 3.")
        else:
            await eventually(lambda: bool(running.mesh.open))
        writer.close()
        await quiet(running.mesh)
        assert len(running.mesh.cancelled) == 2
        await shown(running, 'outcome="cancelled"} 1')


async def test_a_slow_reader_holds_up_nobody_and_is_cut_in_the_end() -> None:
    mesh = TwinMesh(served=(tiny_card(max_model_len=500_000),))
    async with gateway(mesh, slow_reader_timeout_s=0.5) as running:
        reader, writer = await asyncio.open_connection(running.host, running.port, limit=1024)
        writer.write(raw_post(chat(stream=True, max_tokens=400_000)))
        await reader.readuntil(b"data: ")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        others = await asyncio.gather(*(running.client.post(CHAT, json=chat(stream=True, max_tokens=200)) for _ in range(5)))
        assert all(parse_sse(other.text)[1] for other in others)
        await quiet(mesh)
        assert mesh.made < 300_000, "the slow reader's tokens waited"
        writer.close()


async def test_too_many_requests_at_once() -> None:
    gate = asyncio.Event()
    async with gateway(TwinMesh(script=Script(gate=gate)), max_concurrent_requests=2) as running:
        first = [asyncio.create_task(running.client.post(CHAT, json=chat())) for _ in range(2)]
        await eventually(lambda: len(running.mesh.open) == 2)
        refused = await running.client.post(CHAT, json=chat())
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]


async def test_a_slow_head_and_a_slow_body_are_cut() -> None:
    async with gateway(header_timeout_s=0.2, body_timeout_s=0.2) as running:
        reader, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        reader, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(raw_post(chat())[:-5])
        async with asyncio.timeout(5):
            assert b"did not arrive within" in await reader.readuntil(b"}}")
        writer.close()
        kept = await running.client.get("/health")
        assert kept.status_code == 200


async def test_a_request_that_is_no_http_is_answered() -> None:
    async with gateway() as running:
        for junk in (b"nonsense\r\n\r\n", b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000):
            reader, writer = await asyncio.open_connection(running.host, running.port)
            writer.write(junk)
            async with asyncio.timeout(5):
                assert b'"error"' in await reader.read()
            writer.close()


async def test_stopping_lets_streams_finish_and_tells_the_rest() -> None:
    gate = asyncio.Event()
    async with (
        gateway(TwinMesh(script=Script(hold_after=3)), drain_timeout_s=1.0) as running,
        httpx.AsyncClient(trust_env=False) as client,
    ):
        async with client.stream("POST", running.url + CHAT, json=chat(stream=True)) as held:
            lines = held.aiter_lines()
            assert (await anext(lines)).startswith("id: ")
            running.mesh.script = Script(gate=gate)
            finishing = asyncio.create_task(client.post(running.url + CHAT, json=chat(stream=True)))
            await eventually(lambda: len(running.mesh.open) == 2)
            running.stop.set()
            gate.set()
            assert parse_sse((await finishing).text)[1]
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "stopping"
        await quiet(running.mesh)
        with pytest.raises(httpx.ConnectError):
            await client.get(running.url + "/health")


def test_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="give an API key"):
        HttpSettings(host="0.0.0.0")
    assert HttpSettings(host="0.0.0.0", api_keys=("k",)).host == "0.0.0.0"
    assert HttpSettings(host="::1").host == "::1"
    with pytest.raises(SettingsError, match="max_connections"):
        HttpSettings(max_connections=0)
    taken = listen("127.0.0.1", 0)
    with pytest.raises(SettingsError, match="cannot listen"), listen("127.0.0.1", taken.getsockname()[1]):
        pass
    taken.close()


def raw_post(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content
