"""The mesh in containers. The file is checked against our own settings everywhere; it is run where a Docker engine answers
(marker `slow`: the first run builds an image with torch)."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.runtime.metrics import Metrics
from common.runtime.settings_parse import parse_gateway_settings, parse_worker_settings
from common.runtime.status_server import StatusServer

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "compose" / "docker-compose.yml"
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+):-([^}]*)\}")
COMMAND_TIMEOUT_S = 1500
REQUEST_TIMEOUT_S = 120


def _services() -> dict[str, Any]:
    """The compose file as it reads where no variable is set."""
    yaml = pytest.importorskip("yaml")
    text = VARIABLE.sub(lambda found: found[2], COMPOSE_FILE.read_text("utf-8"))
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def _environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in service["environment"].items() if value is not None}


# ---------------------------------------------------------------------- the file alone


def test_the_services_take_the_settings_that_the_file_gives_them() -> None:
    services = _services()
    gateway = parse_gateway_settings([], _environment(services["gateway"]))
    assert (gateway.port, gateway.api_keys, gateway.insecure) == (8000, (), True)
    for name in ("prefill", "decode"):
        environment = _environment(services[name])
        assert environment["SEGUE_HOST"] == "auto"
        worker = parse_worker_settings([], environment | {"SEGUE_HOST": "127.0.0.1"}, default_role="decode")
        assert worker.mesh.nats_url == gateway.mesh.nats_url
        assert worker.mesh.redis_url == gateway.mesh.redis_url
        assert worker.mesh.cluster_key_file is not None
        assert worker.status_port is not None
        assert worker.worker_id != parse_worker_settings([], environment | {"SEGUE_HOST": "::1"}, default_role="decode").worker_id


def test_only_the_gateway_is_published_and_only_on_loopback() -> None:
    services = _services()
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:8000:8000"]}
    assert not any(service.get("network_mode") == "host" for service in services.values())


def test_every_service_that_stays_has_a_health_check_a_restart_and_bounded_logs() -> None:
    for name, service in _services().items():
        assert service["logging"]["options"].keys() >= {"max-size", "max-file"}, name
        if name != "cluster-key":
            assert "healthcheck" in service, name
            assert service["restart"] == "unless-stopped", name


def test_workers_share_what_shared_memory_needs() -> None:
    services = _services()
    for name in ("prefill", "decode"):
        assert services[name]["ipc"] == services[name]["pid"] == "service:kv-namespace"
    assert services["kv-namespace"]["ipc"] == "shareable"
    assert "shm_size" in services["kv-namespace"]


@pytest.mark.parametrize(("name", "own_port"), [("prefill", "9100"), ("decode", "9100"), ("gateway", "8000")])
async def test_each_service_is_asked_whether_it_lives_in_words_that_it_understands(name: str, own_port: str) -> None:
    script, check = _services()[name]["entrypoint"][1:]
    assert script == "/usr/local/bin/watched.sh"
    lives = [True]
    async with StatusServer("127.0.0.1", 0, Metrics(), ready=lambda: False, alive=lambda: lives[0]) as server:
        assert server.url is not None
        question = check.replace("$$", "$").replace(own_port, server.url.rpartition(":")[2])

        async def answer() -> int:
            asking = await asyncio.create_subprocess_exec("sh", "-c", question, env={**os.environ, "HOSTNAME": "127.0.0.1"})
            return await asking.wait()

        assert await answer() == 0
        lives[0] = False
        assert await answer() != 0
    assert await answer() != 0


def test_brokers_are_watched_too() -> None:
    for name in ("nats", "valkey"):
        assert _services()[name]["entrypoint"][:2] == ["sh", "/usr/local/bin/watched.sh"]


def test_each_image_is_built_once() -> None:
    """A second build of one tag gives it another id, and `--scale` then replaces what runs."""
    own = [service for service in _services().values() if service["image"].startswith("segue-")]
    built = [service["image"] for service in own if "build" in service]
    assert sorted(built) == sorted({service["image"] for service in own})
    assert all(("build" in service) != (service.get("pull_policy") == "never") for service in own)


def test_the_example_of_settings_lists_those_of_the_file_with_their_defaults() -> None:
    in_file = dict(VARIABLE.findall(COMPOSE_FILE.read_text("utf-8")))
    lines = (COMPOSE_FILE.parent / ".env.example").read_text("utf-8").splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == in_file


# ---------------------------------------------------------------------- in containers


class Containers:
    """One project of its own: nothing of it is shared with a mesh that somebody runs from the same file."""

    def __init__(self) -> None:
        self.project = f"segue-test-{secrets.token_hex(4)}"
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("SEGUE_")}
        self._environ |= {"SEGUE_PORT": "0", "SEGUE_KV_CACHE_MEMORY": "512MiB"}

    def compose(self, *arguments: str) -> str:
        return self._run("docker", "compose", "-p", self.project, "-f", str(COMPOSE_FILE), *arguments)

    def docker(self, *arguments: str) -> str:
        return self._run("docker", *arguments)

    def ids(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def url(self) -> str:
        return "http://" + self.compose("port", "gateway", "8000").strip()

    def computed_tokens(self, worker: str) -> int:
        """What the worker's own metrics say."""
        program = "import socket, urllib.request as r; print(r.urlopen(f'http://{socket.gethostname()}:9100/metrics').read().decode())"
        exposition = self.docker("exec", worker, "python", "-c", program)
        return int(float(re.findall(r"^segue_computed_tokens_total (\S+)$", exposition, re.MULTILINE)[0]))

    def left_over(self) -> list[str]:
        label = f"label=com.docker.compose.project={self.project}"
        listings = [("ps", "-aq"), ("volume", "ls", "-q"), ("network", "ls", "-q")]
        return [found for listing in listings for found in self.docker(*listing, "--filter", label).split()]

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environ, cwd=ROOT, timeout=COMMAND_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@contextlib.contextmanager
def _running_containers() -> Iterator[Containers]:
    containers = Containers()
    try:
        containers.compose("up", "-d", "--build", "--wait")
        yield containers
    except AssertionError as error:
        raise AssertionError(f"{error}\n{containers.compose('logs', '--tail', '40')}") from error
    finally:
        containers.compose("down", "-v", "--timeout", "10")
    assert containers.left_over() == []


@pytest.fixture(scope="module")
def docker_engine() -> None:
    if shutil.which("docker") is None:
        pytest.skip("containers: there is no docker here")
    for question in (("docker", "version"), ("docker", "compose", "version")):
        if subprocess.run(question, capture_output=True, check=False).returncode != 0:
            pytest.skip(f"containers: `{' '.join(question)}` does not succeed")


def _with_model(url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"model": httpx.get(f"{url}/v1/models", timeout=REQUEST_TIMEOUT_S).json()["data"][0]["id"], **body}


class Streaming(threading.Thread):
    """A stream that runs beside what the test does; `text` and `usage` are what arrived."""

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__()
        self._url = url
        self._body = _with_model(
            url,
            {
                "prompt": "Once upon a time",
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
        self.began = threading.Event()
        self.text = ""
        self.usage: dict[str, int] | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=REQUEST_TIMEOUT_S) as answer:
                answer.raise_for_status()
                self._read(answer)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.error = error
        finally:
            self.began.set()

    def _read(self, answer: httpx.Response) -> None:
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            self.text += "".join(choice["text"] for choice in event["choices"])
            self.usage = event.get("usage") or self.usage
            self.began.set()

    def whole(self) -> str:
        self.join(REQUEST_TIMEOUT_S)
        assert self.error is None, repr(self.error)
        assert self.usage is not None, "the stream broke off"
        assert self.usage["completion_tokens"] == self._body["max_tokens"]
        return self.text


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.timeout(300)
@pytest.mark.parametrize("broker", ["nats", "valkey"])
def test_a_frozen_broker_is_replaced(broker: str, docker_engine: None) -> None:
    containers = Containers()
    freeze = (
        f'for p in /proc/[0-9]*; do read -r name < $p/comm; case "$name" in {broker}-server*) kill -STOP ${{p#/proc/}};; esac; done'
    )
    try:
        containers.compose("up", "-d", "--wait", broker)
        (container,) = containers.ids(broker)
        containers.docker("exec", container, "sh", "-c", freeze)
        deadline = time.monotonic() + 120
        while containers.docker("inspect", "-f", "{{.RestartCount}}", container).strip() == "0":
            assert time.monotonic() < deadline, containers.compose("logs", broker)
            time.sleep(0.5)
        containers.compose("up", "-d", "--wait", broker)
    finally:
        containers.compose("down", "-v", "--timeout", "10")
    assert containers.left_over() == []


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_the_mesh_runs_in_containers_grows_and_survives_a_death(docker_engine: None) -> None:
    with _running_containers() as containers:
        url = containers.url()
        assert url.startswith("http://127.0.0.1:")
        alone = Streaming(url, 200)
        alone.start()
        expected = alone.whole()

        running = containers.ids("decode")
        during = Streaming(url, 200)
        during.start()
        assert during.began.wait(REQUEST_TIMEOUT_S)
        containers.compose("up", "-d", "--no-build", "--wait", "--scale", "decode=2")
        assert during.whole() == expected

        (first,) = running
        (second,) = set(containers.ids("decode")) - {first}
        streams = [Streaming(url, 150) for _ in range(6)]
        for stream in streams:
            stream.start()
        answers = {stream.whole() for stream in streams}
        assert len(answers) == 1
        for worker in (first, second):
            assert containers.computed_tokens(worker) > 0
        joined = re.findall(r"peer_joined peer=(\S+) tier=(\S+)", containers.compose("logs", "prefill"))
        assert {tier for _, tier in joined} == {"shm"}
        assert len({peer for peer, _ in joined}) == 2

        streams = [Streaming(url, 150) for _ in range(6)]
        for stream in streams:
            stream.start()
        assert all(stream.began.wait(REQUEST_TIMEOUT_S) for stream in streams)
        containers.docker("kill", second)
        assert {stream.whole() for stream in streams} == answers

        gateway = containers.ids("gateway")[0]
        containers.docker("exec", gateway, "python", "-c", "from importlib.util import find_spec as f; assert not f('torch')")
        assert containers.docker("exec", gateway, "id", "-u").strip() != "0"
