"""How many tokens a request will make, before it has made them: what its class has made lately, within what it asked for."""

FIRST_GUESS_SHARE = 0.5
"""Of `max_tokens`, before anything of the class has ended."""
KEPT = 0.98


class OutputLengths:
    """`classes` bounds how many are kept apart; others share one."""

    def __init__(self, classes: int = 64) -> None:
        self._classes = classes
        self._means: dict[str, tuple[float, float]] = {}

    def observe(self, request_class: str, tokens: int) -> None:
        """A request of the class ended by itself, after that many tokens."""
        name = self._name(request_class)
        total, weight = self._means.get(name, (0.0, 0.0))
        self._means[name] = (KEPT * total + tokens, KEPT * weight + 1.0)

    def predicted(self, request_class: str, max_tokens: int, made: int = 0) -> float:
        """In all, given how many it has made: one that is past the mean goes on as long again (lengths are heavy-tailed)."""
        total, weight = self._means.get(self._name(request_class), (FIRST_GUESS_SHARE * max_tokens, 1.0))
        mean = total / weight
        return min(float(max_tokens), mean if made < mean else 2.0 * made)

    def _name(self, request_class: str) -> str:
        known = request_class in self._means or len(self._means) < self._classes
        return request_class if known else ""
