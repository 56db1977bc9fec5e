"""How fast a client wants its answer: by headers, or by the body's `metadata`, within what the class of its API key allows.

| header | metadata | |
| --- | --- | --- |
| `x-slo-ttft-ms` | `slo_ttft_ms` | until the first token |
| `x-slo-tpot-ms` | `slo_tpot_ms` | between later ones |
| `x-slo-class` | `slo_class` | the class, for keys that are bound to none |
"""

import math
from collections.abc import Mapping, Sequence

from common.values.errors import InvalidRequest
from common.values.request_class import DEFAULT_CLASS, RequestClass, WantedSpeed
from services.gateway.http.api_keys import ApiKeys
from services.gateway.http.asgi import Scope, header

LONGEST_MS = 3_600_000.0


class SpeedWishes:
    def __init__(self, classes: Sequence[RequestClass], keys: ApiKeys) -> None:
        self._classes = {each.name: each for each in classes} or {DEFAULT_CLASS: RequestClass(name=DEFAULT_CLASS)}
        self._keys = keys

    def of(self, scope: Scope, tenant: str, metadata: Mapping[str, object] | None) -> WantedSpeed:
        """What a header says goes before the body. Raises InvalidRequest, naming the header."""
        known = metadata or {}
        chosen = self._class(_given(scope, "x-slo-class", known.get("slo_class")), tenant)
        ttft_s = _seconds("x-slo-ttft-ms", _given(scope, "x-slo-ttft-ms", known.get("slo_ttft_ms")))
        tpot_s = _seconds("x-slo-tpot-ms", _given(scope, "x-slo-tpot-ms", known.get("slo_tpot_ms")))
        try:
            return chosen.wanted(ttft_s=ttft_s, tpot_s=tpot_s, account=tenant)
        except ValueError as error:
            name = str(error)
            least_s = chosen.ttft_s if name == "ttft" else chosen.tpot_s
            message = f"requests of the class {chosen.name} may ask for a {name} of {1000.0 * (least_s or 0.0):g} ms or more"
            raise InvalidRequest(message, param=f"x-slo-{name}-ms") from None

    def _class(self, asked: str | None, tenant: str) -> RequestClass:
        bound = self._keys.request_class(tenant)
        if asked is not None and bound is not None and asked != bound:
            raise InvalidRequest(f"this API key is for requests of the class {bound}", param="x-slo-class")
        name = bound or asked or DEFAULT_CLASS
        if name not in self._classes:
            raise InvalidRequest(f"there is no class {name[:64]} here: {', '.join(sorted(self._classes))}", param="x-slo-class")
        return self._classes[name]


def _given(scope: Scope, name: str, otherwise: object) -> str | None:
    value = header(scope, name.encode())
    if value is not None:
        return value.decode("latin-1").strip()
    return None if otherwise is None else str(otherwise)


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0.0 < milliseconds <= LONGEST_MS:
        raise InvalidRequest(f"{name} takes a number of milliseconds above 0", param=name)
    return milliseconds / 1000.0
