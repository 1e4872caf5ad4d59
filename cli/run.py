"""`llmc run`: generate text with a bundle."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.output import Json, allows, print_json
from llmc.cli.progress import waiting
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine, RequestOutput
    from llmc.runtime.sampling import SamplingParams

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class Prompt:
    """A prompt."""

    text: str
    #: The file and line that it came from; "": the command line.
    where: str = ""


@dataclass(frozen=True)
class Answer:
    """A finished prompt. Seconds count from the moment when the engine got all prompts."""

    prompt: Prompt
    output: RequestOutput
    seconds: float
    first_token_seconds: float
    #: The seed of its draws; None: decoding was greedy.
    seed: int | None


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to run.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Run every line of a file as a prompt, at once; - is stdin."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Wrap each prompt in the model's chat template, as the user's message."),
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens to generate at most (default: 128).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 always takes the most likely token (default: 0).")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Draw from the K most likely tokens (default: 0, all).")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the tokens that make up probability P (default: 1, all)."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Drop tokens less than P times as likely as the likeliest (default: 0, none)."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="R", help="Above 1: avoid tokens already seen (default: 1).")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make the draws reproducible.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print text as it comes (default: on a terminal)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads (default: one for each core).")
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for the KV cache, such as 512M or 2G (default: 4G at most)."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Quantize activations to int8 (int8 and int4 bundles); this changes the output."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate text with a bundle.

    Only the generated text goes to stdout. Statistics go to stderr, if that is a terminal.

    \b
    Examples:
      llmc run tales.llmc "Once upon a time"
      llmc run tales.llmc "Once upon a time" --max-tokens 60 --temperature 0.5 --seed 1
      llmc run tales.llmc --prompts prompts.txt --json
    """
    nbytes = parse_size(kv_memory) if kv_memory is not None else None
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    from llmc.runtime.sampling import SamplingParams

    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if stream and (as_json or prompts is not None):
        other = "--json" if as_json else "--prompts"
        raise RequestError(f"--stream cannot be combined with {other}", "leave one of them out", "stream")
    read = read_prompts(prompt, prompts)
    started = time.perf_counter()
    with waiting(f"loading {bundle} ..."):
        from llmc.runtime.load import load_engine

        engine = load_engine(bundle, kv_memory=nbytes, threads=threads, fast=fast)
    if engine.tokenizer is None:
        raise RequestError(f"{bundle} has no tokenizer", "rebuild it from a checkpoint with a tokenizer.json")
    loaded = time.perf_counter() - started
    streaming = sys.stdout.isatty() if stream is None else stream
    streaming = streaming and prompts is None and not as_json
    answers: list[Answer] = []
    as_object = functools.partial(_print_json, bundle=bundle, loaded=loaded)
    show = as_object if as_json else _print_section if prompts is not None else _print_text
    try:
        for answer in serve(engine, read, params, chat, _print_piece if streaming else _ignore):
            answers.append(answer)
            if not streaming:
                show(answer, len(answers))
    finally:
        if streaming:
            print(flush=True)
    if allows("debug") or (sys.stderr.isatty() and allows("info")):
        print(_statistics(answers, loaded), file=sys.stderr)


def serve(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    chat: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> Iterator[Answer]:
    """Run all prompts at once. Yield each answer as soon as it and those before it are finished.

    on_text: is called with every new piece of text, of any prompt
    """
    started = time.perf_counter()
    each = [_seeded(params) for _ in prompts]
    ids = {_add(engine, prompt, each[number], chat): number for number, prompt in enumerate(prompts)}
    first: dict[int, float] = {}
    finished: dict[int, Answer] = {}
    next_number = 0
    while engine.has_unfinished:
        for output in engine.step():
            number, seconds = ids[output.request_id], time.perf_counter() - started
            first.setdefault(number, seconds)
            if output.new_text:
                on_text(output.new_text)
            if output.finish_reason:
                finished[number] = Answer(prompts[number], output, seconds, first[number], each[number].seed)
        while next_number in finished:
            yield finished.pop(next_number)
            next_number += 1


def _seeded(params: SamplingParams) -> SamplingParams:
    """Return `params` with a random seed if they draw without one, so that the answer can be repeated."""
    if params.seed is not None or params.temperature == 0:
        return params
    return replace(params, seed=int.from_bytes(os.urandom(4), "little"))


def _add(engine: Engine, prompt: Prompt, params: SamplingParams, chat: bool) -> str:
    try:
        if chat and engine.tokenizer is not None:
            token_ids = engine.tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
            return engine.add_request(token_ids, params)
        return engine.add_request(prompt.text, params)
    except RequestError as error:
        if not prompt.where:
            raise
        raise RequestError(f"{prompt.where}: {error.message}", error.hint) from error


def read_prompts(prompt: str | None, file: str | None) -> list[Prompt]:
    """Return the prompts that the command line names. Raises RequestError if there is none."""
    if prompt is not None and file is not None:
        raise RequestError("there is a prompt and --prompts", "leave one of them out", "prompts")
    if file is not None:
        name = "stdin" if file == "-" else file
        lines = _read(file, name).replace("\r\n", "\n").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise RequestError(f"{name}:{number}: the line is empty", "write one prompt on each line")
        return [Prompt(line, f"{name}:{number}") for number, line in enumerate(lines, 1)]
    if prompt is None:
        hint = 'give it after the bundle ("Once upon a time"), - for stdin, or --prompts FILE'
        raise RequestError("there is no prompt", hint, "prompt")
    text = _read("-", "stdin").removesuffix("\n") if prompt == "-" else prompt
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that Python could not decode
        raise RequestError(
            "the prompt is not valid UTF-8", "give it in a file with --prompts", "prompt"
        ) from error
    if not text:
        raise RequestError(
            "the prompt is empty", "give at least one character", "" if prompt == "-" else "prompt"
        )
    return [Prompt(text)]


def parse_size(text: str) -> int:
    """Return the bytes of "512M", "2G", "1.5GiB" or a plain number; the units are powers of 1024."""
    import math

    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = digits[-1:] if digits[-1:].isalpha() else ""
    try:
        value = float(digits.removesuffix(unit)) * 2 ** _UNITS[unit]
        if not 0 < value < math.inf:
            raise ValueError
    except (KeyError, ValueError) as error:
        raise typer.BadParameter(
            f"{text!r} is not a size such as 512M or 2G", param_hint="--kv-memory"
        ) from error
    return int(value)


def _read(file: str, name: str) -> str:
    """Return the whole text of a file, or of stdin."""
    if file == "-" and sys.stdin is None:
        raise RequestError("stdin is closed", "give the prompt as an argument, or --prompts FILE")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise RequestError(
            f"cannot read the prompts in {name}: {error.strerror or error}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start}", "convert it"
        ) from error


def _ignore(text: str) -> None:
    del text


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _print_text(answer: Answer, number: int) -> None:
    del number
    print(answer.output.text, flush=True)


def _print_section(answer: Answer, number: int) -> None:
    separator = "\n" if number > 1 else ""
    print(f"{separator}==> {number}: {answer.prompt.text} <==\n{answer.output.text}", flush=True)


def _print_json(answer: Answer, number: int, *, bundle: Path, loaded: float) -> None:
    del number
    output = answer.output
    record: dict[str, Any] = {
        "bundle": str(bundle),
        "prompt": answer.prompt.text,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.prompt_tokens,
        "seed": answer.seed,
        "load_seconds": round(loaded, 6),
        "first_token_seconds": round(answer.first_token_seconds, 6),
        "seconds": round(answer.seconds, 6),
    }
    print_json(record)


def _statistics(answers: Sequence[Answer], loaded: float) -> str:
    prompt_tokens = sum(answer.output.prompt_tokens for answer in answers)
    new_tokens = sum(len(answer.output.token_ids) for answer in answers)
    seconds = max(answer.seconds for answer in answers)
    first = min(answer.first_token_seconds for answer in answers)
    return (
        f"{prompt_tokens} prompt tokens, {new_tokens} new ones in {seconds:.2f} s "
        f"({new_tokens / seconds:.1f} tok/s), the first after {first * 1e3:.0f} ms; loaded in {loaded:.2f} s"
    )
