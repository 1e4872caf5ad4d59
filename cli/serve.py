"""Answer many prompts at once, and yield the answers in the order of the prompts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmc.cli.prompts import Prompt
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine, RequestOutput
    from llmc.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt. Times are measured from the start of `serve`."""

    prompt: Prompt
    output: RequestOutput
    #: The time until the answer was complete.
    seconds: float
    #: The time until its first token.
    first_token_seconds: float
    #: The seed of its sampling; None if decoding was greedy.
    seed: int | None


@dataclass(frozen=True)
class Failure:
    """A line that is not a prompt, or a prompt that the engine refused."""

    prompt: Prompt
    error: RequestError


def serve(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    chat: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
    system: str | None = None,
) -> Iterator[Answer | Failure]:
    """Run all prompts at once. Yield the results in order, each as soon as it and those before are finished.

    params: the sampling parameters that a prompt does not set itself
    chat: whether each prompt is put into the chat template, as the user's message
    on_text: called with every new piece of text, of any prompt
    system: the system message for the chat template

    Raises RequestError if the engine refuses a prompt of the command line. A prompt of a file that cannot be
    run is a Failure.
    """
    started = time.perf_counter()
    ids: dict[str, int] = {}
    first: dict[int, float] = {}
    finished: dict[int, Answer | Failure] = {}
    seeds: dict[int, int | None] = {}
    for number, prompt in enumerate(prompts):
        try:
            if prompt.error:
                raise prompt.error
            each = seeded(replace(params, **prompt.options))
            ids[_add(engine, prompt, each, chat, system)] = number
            seeds[number] = each.seed
        except RequestError as error:
            if not prompt.where:
                raise
            finished[number] = Failure(prompt, error)
    next_number = 0
    while next_number < len(prompts):
        while next_number in finished:
            yield finished.pop(next_number)
            next_number += 1
        for output in engine.step() if next_number < len(prompts) else ():
            number, seconds = ids[output.request_id], time.perf_counter() - started
            first.setdefault(number, seconds)
            if output.new_text:
                on_text(output.new_text)
            if output.finish_reason:
                finished[number] = Answer(prompts[number], output, seconds, first[number], seeds[number])


def seeded(params: SamplingParams) -> SamplingParams:
    """Return `params` with a random seed if they sample without one, so that the answer can be repeated."""
    if params.seed is not None or params.temperature == 0:
        return params
    return replace(params, seed=int.from_bytes(os.urandom(4), "little"))


def _add(engine: Engine, prompt: Prompt, params: SamplingParams, chat: bool, system: str | None) -> str:
    """Queue a prompt and return the id of its request."""
    try:
        if prompt.messages is None and not chat:
            return engine.add_request(prompt.text if prompt.token_ids is None else prompt.token_ids, params)
        if prompt.token_ids is not None:
            raise RequestError("token ids do not fit into the chat template", "give a text or messages")
        messages = prompt.messages
        if messages is None:
            messages = [{"role": "user", "content": prompt.text}]
        return engine.add_request(encode_chat(engine, messages, system), params)
    except RequestError as error:
        if not prompt.where:
            raise
        raise RequestError(f"{prompt.where}: {error.message}", error.hint) from error


def encode_chat(engine: Engine, messages: list[Any], system: str | None) -> list[int]:
    """Return the token ids of a conversation. `system` comes first, unless there is a system message."""
    has_one = isinstance(messages[0], dict) and messages[0].get("role") == "system" if messages else False
    first = [{"role": "system", "content": system}] if system is not None and not has_one else []
    assert engine.tokenizer is not None
    return engine.tokenizer.encode_chat([*first, *messages])
