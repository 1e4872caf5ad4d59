"""Answers to many prompts at once, in the order of the prompts."""

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
    """A finished prompt. Seconds count from the moment when the engine got all prompts."""

    prompt: Prompt
    output: RequestOutput
    seconds: float
    first_token_seconds: float
    #: The seed of its draws; None: decoding was greedy.
    seed: int | None


@dataclass(frozen=True)
class Failure:
    """A line that is no prompt, or a prompt that the engine refused."""

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
    """Run all prompts at once. Yield each result as soon as it and those before it are finished.

    params: for prompts that set none. on_text: is called with every new piece of text, of any prompt.
    system: the system message of prompts in the chat template.
    Raises RequestError for a prompt of the command line that is refused. One of a file is a Failure.
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
    """Return `params` with a random seed if they draw without one, so that the answer can be repeated."""
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
    """Return the token ids of a conversation, with the system message first unless it has one already."""
    has_one = isinstance(messages[0], dict) and messages[0].get("role") == "system" if messages else False
    first = [{"role": "system", "content": system}] if system is not None and not has_one else []
    assert engine.tokenizer is not None
    return engine.tokenizer.encode_chat([*first, *messages])
