"""`segue chat`: talk to a running server in the terminal; each answer streams, with its TTFT and tokens/s.

With a message as argument, or text on standard input, it answers once. Ctrl-C stops an answer and keeps the conversation.
"""

import argparse
import asyncio
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from common.runtime.settings import is_loopback
from tools.chat_stream import Answer, ChatFailed, Message, first_model, stream_answer

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit (or Ctrl-D) leaves"
KEY_VARIABLES = ("SEGUE_API_KEY", "OPENAI_API_KEY")


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What was said so far. An answer that was stopped is kept as far as it came."""

    system: str | None
    messages: list[Message] = field(default_factory=list)

    def asked(self, text: str) -> list[Message]:
        """The messages to send for this question."""
        head = [] if self.system is None else [Message("system", self.system)]
        return [*head, *self.messages, Message("user", text)]

    def keep(self, question: str, answer: str) -> None:
        if answer:
            self.messages += [Message("user", question), Message("assistant", answer)]


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    message = " ".join(options.message)
    if not sys.stdin.isatty() and (not message or message == "-"):
        message = sys.stdin.read().strip()
        if not message:
            print("segue chat: standard input is empty", file=sys.stderr)
            return 2
    try:
        return asyncio.run(_run(options, message))
    except ChatFailed as error:
        print(f"segue chat: {error}", file=sys.stderr)
        return 1


async def _run(options: argparse.Namespace, message: str) -> int:
    key = options.api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(10.0, read=60.0)
    url = options.url.rstrip("/")
    outside = not is_loopback(httpx.URL(url).host)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, trust_env=outside) as client:
        model = options.model or await first_model(client)
        conversation = Conversation(system=options.system)
        if message:
            await _answer(client, model, conversation, message, options)
            return 0
        with suppress(ImportError):
            importlib.import_module("readline")
        print(f"{model} at {options.url}. {HELP}")
        await _talk(client, model, conversation, options)
    return 0


async def _talk(client: httpx.AsyncClient, model: str, conversation: Conversation, options: argparse.Namespace) -> None:
    while (line := _read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.messages.clear()
                print("(forgotten)")
            case "/system":
                conversation.system = rest.strip() or None
                print("(set)")
            case _ if command.startswith("/"):
                print(HELP)
            case _:
                try:
                    await _answer(client, model, conversation, line.strip(), options)
                except ChatFailed as error:
                    print(f"({error})")


async def _answer(
    client: httpx.AsyncClient, model: str, conversation: Conversation, question: str, options: argparse.Namespace
) -> None:
    """Stream one answer; SIGINT meanwhile stops it alone."""
    answer = Answer()
    task = asyncio.ensure_future(
        stream_answer(
            client,
            model,
            conversation.asked(question),
            answer,
            write=_write,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
        )
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        with suppress(asyncio.CancelledError):
            await task
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        _write("\n")
        print(answer.figures(was_stopped=task.cancelled()), file=sys.stderr)
        conversation.keep(question, answer.text)


def _read_line() -> str | None:
    """A line of the user; None at the end of the input, or for Ctrl-C at the prompt.

    It blocks the event loop, on which nothing else runs meanwhile: a thread would keep the program from ending at Ctrl-C.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segue chat", description=__doc__, epilog=HELP)
    parser.add_argument("message", nargs="*", help="ask this once and leave; - or nothing reads a piped standard input")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the gateway is (default: %(default)s)")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--api-key", help=f"default: the environment's {' or '.join(KEY_VARIABLES)}")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer, in tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    return parser
