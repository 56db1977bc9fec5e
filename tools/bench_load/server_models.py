"""Which models a server says that it has."""

import msgspec

from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import Endpoint
from tools.bench_load.http_client import HttpClient

MODELS_PATH = "/v1/models"


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


async def first_model(endpoint: Endpoint, client: HttpClient) -> str:
    """Raises BenchRefused where it names none."""
    answer = await client.get(MODELS_PATH)
    try:
        models = msgspec.json.decode(bytes(answer.body), type=_Models).data if answer.status == 200 else []
    except msgspec.DecodeError:
        models = []
    if not models:
        why = answer.broken or (f"status {answer.status}" if answer.status else "no answer")
        raise BenchRefused(f"{endpoint.label} names no model at {MODELS_PATH} ({why}); is it running? --model names one")
    return models[0].id
