"""Chat templates: Jinja from the model's own files, run in a sandbox that cannot change its arguments.

The helpers are those that published templates expect (Hugging Face's `chat_template` conventions): `raise_exception`,
`strftime_now`, `tojson` without HTML escaping, `break`/`continue`, and the `generation` block.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.values.errors import InvalidRequest, ModelError

Message = Mapping[str, object]


class _Refused(Exception):
    """Raised by a template through `raise_exception`."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here its body is simply shown."""

    tags = {"generation"}  # noqa: RUF012 the base class declares a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. `special_tokens` (`bos_token`, …) are visible to it by name."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, object] | None = None,
    ) -> str:
        """Raises InvalidRequest where the template refuses these messages."""
        variables = self._special_tokens | dict(arguments or {})
        variables |= {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except _Refused as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(f"the model's chat template cannot show these messages: {error}", param="messages") from error


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
