"""Chat messages as templates expect them: content as one string, arguments of tool calls as objects."""

from collections.abc import Sequence

import msgspec

from common.values.errors import InvalidRequest
from services.gateway.openai.body import ChatMessage, Json, ToolCall


def template_messages(messages: Sequence[ChatMessage]) -> tuple[list[Json], int]:
    """Messages for the template, and the number of characters in them."""
    shown: list[Json] = []
    characters = 0
    for place, message in enumerate(messages):
        entry: Json = msgspec.to_builtins(message)
        content = _content(message, place)
        entry["content"] = content
        if message.tool_calls is not None:
            entry["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
            characters += sum(len(call.function.arguments) for call in message.tool_calls)
        characters += len(content or "") + len(message.reasoning_content or "")
        shown.append(entry)
    return shown, characters


def _content(message: ChatMessage, place: int) -> str | None:
    """Text parts are joined by line breaks, as in vLLM."""
    content = message.content
    if content is None:
        if message.role in ("assistant", "function"):
            return None if message.tool_calls else ""
        raise InvalidRequest(f"a {message.role} message needs content", param=f"messages[{place}].content")
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.type not in ("text", "input_text", "refusal") or part.text is None:
            raise InvalidRequest(f"a content part of type {part.type} is not supported, only text", param=f"messages[{place}].content")
        texts.append(part.text)
    return "\n".join(texts)


def _tool_call(call: ToolCall) -> Json:
    """Clients send arguments as a string of JSON; templates write them with `tojson`."""
    entry: Json = msgspec.to_builtins(call)
    arguments: object = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments else {}
        except msgspec.DecodeError:
            arguments = call.function.arguments
    entry["function"] = {"name": call.function.name, "arguments": arguments}
    return entry
