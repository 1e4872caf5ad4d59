"""The conversation of `llmc run --chat`: read messages from stdin, print answers as they are generated."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmc.cli.errors import print_error
from llmc.cli.output import note
from llmc.cli.prompts import Prompt
from llmc.cli.serve import Answer, encode_chat, seeded
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine
    from llmc.runtime.sampling import SamplingParams

CLEAR = "/clear"
_HELP = f"Ctrl-C stops an answer, {CLEAR} starts a new conversation, Ctrl-D ends"


def converse(
    engine: Engine,
    params: SamplingParams,
    system: str | None,
    show: Callable[[Answer], None] | None,
    *,
    limited: bool,
    streaming: bool,
) -> bool:
    """Answer every line of stdin, given the conversation so far. Return whether all were answered.

    On a terminal the result is True, because the user has seen the errors.

    system: the system message, if any
    show: prints a finished answer; None: its text is printed, piece by piece if `streaming`
    limited: whether the user set `params.max_tokens`; else an answer may fill the context

    Raises RequestError if the model has no chat template, or if stdin has no message.
    """
    assert engine.tokenizer is not None
    if engine.tokenizer.chat_template is None:
        engine.tokenizer.apply_chat_template([])  # raises the RequestError for a missing template
    terminal = _is_terminal()
    if terminal:
        print(_HELP, file=sys.stderr)
    history: list[dict[str, Any]] = []
    answered = failed = 0
    for text in _messages(terminal):
        if text.strip() == CLEAR:
            history = []
            continue
        messages = [*history, {"role": "user", "content": text}]
        try:
            with _interrupts() as interrupted:
                ids = encode_chat(engine, messages, system)
                fitting = params if limited else replace(params, max_tokens=_room(engine, len(ids)))
                answer = _answer(engine, Prompt(text), ids, fitting, interrupted, streaming and show is None)
        except RequestError as error:
            print_error(error)
            failed += 1
            continue
        answered += 1
        if show is not None:
            show(answer)
        else:
            print("" if streaming else answer.output.text, flush=True)
        _note_end(answer)
        history = [*messages, {"role": "assistant", "content": answer.output.text}]
    if not terminal and not answered and not failed:
        raise RequestError(
            "there is no prompt", "write messages to stdin, one a line, or start on a terminal"
        )
    return terminal or not failed


def _room(engine: Engine, prompt_tokens: int) -> int:
    """Return how many tokens fit after a prompt. Raises RequestError if there are none."""
    pool = engine.scheduler.pool
    room = min(engine.scheduler.max_seq_len, pool.num_blocks * pool.block_size + 1) - prompt_tokens
    if room < 1:
        raise RequestError(
            f"the conversation has {prompt_tokens} tokens, which fill the context",
            f"{CLEAR} starts a new conversation",
        )
    return room


def _answer(
    engine: Engine,
    prompt: Prompt,
    ids: list[int],
    params: SamplingParams,
    interrupted: Callable[[], bool],
    streaming: bool,
) -> Answer:
    """Return the answer to a prompt. Ctrl-C ends it early; the tokens generated so far are the answer.

    ids: the token ids of the conversation
    interrupted: returns whether the user pressed Ctrl-C
    streaming: whether to print the text as it is generated
    """
    started = time.perf_counter()
    first = 0.0
    params = seeded(params)
    outputs = engine.stream(ids, params)
    with closing(outputs):  # type: ignore[type-var]  # a generator
        for output in outputs:
            first = first or time.perf_counter() - started
            if streaming:
                print(output.new_text, end="", flush=True)
            if interrupted() and (ended := engine.abort(output.request_id)):
                output = ended
                if streaming:
                    print(output.new_text, end="", flush=True)
                break
    return Answer(prompt, output, time.perf_counter() - started, first, params.seed)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C instead of raising KeyboardInterrupt, which would discard the KV cache.

    Yields a function that returns whether Ctrl-C was pressed. Pressed again, it raises KeyboardInterrupt.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        if seen:
            signal.default_int_handler(number, frame)
        seen.append(number)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)


def _note_end(answer: Answer) -> None:
    tokens = len(answer.output.token_ids)
    if answer.output.finish_reason == "abort":
        note("the answer was stopped")
    elif answer.output.finish_reason == "length":
        note(f"the answer was cut after {tokens} tokens")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _messages(terminal: bool) -> Iterator[str]:
    """Yield the lines of stdin that are not empty."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then has a history and keys to edit)
    while (line := _line(terminal)) is not None:
        if line.strip():
            yield line


def _line(terminal: bool) -> str | None:
    """Return the next line of stdin, or None at its end."""
    while True:
        try:
            if terminal and sys.stdout.isatty():
                return input("> ")
            if terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            data = b"" if sys.stdin is None else sys.stdin.buffer.readline()
            return data.decode("utf-8-sig").rstrip("\r\n") if data else None
        except EOFError:
            print(file=sys.stderr)
            return None
        except UnicodeDecodeError:
            print_error(RequestError("the message is not valid UTF-8", "set the terminal to UTF-8"))
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(f"\n{_HELP}", file=sys.stderr)
