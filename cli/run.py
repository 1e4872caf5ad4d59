"""`llmc run`: generate text with a bundle."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.errors import ERROR, error_of, print_error
from llmc.cli.output import Json, allows, note, print_json
from llmc.cli.progress import waiting
from llmc.cli.prompts import Prompt, read_prompts
from llmc.cli.serve import Answer, Failure, serve
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.sampling import SamplingParams

_FILTERS = {"top_k": 0, "top_p": 1, "min_p": 0}  # sampling options -> the value that turns them off
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}  # unit -> power of two


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to run.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Run every line of a file as a prompt, at once; - is stdin. Lines are plain text, or JSON "
            "objects with a prompt or messages, sampling parameters and an id.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Wrap each prompt in the model's chat template, as the user's message. Without a prompt: "
            "hold a conversation.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message of --chat.")] = None,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Take the most likely token, without the bundle's sampling defaults."),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens to generate at most (default: 128; in a conversation, all that fit)."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T", help="0 always takes the most likely token (default: the bundle's, else 0)."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Draw from the K most likely tokens (default: the bundle's, else 0, all)."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw from the tokens that make up probability P (default: the bundle's, else 1, all).",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Drop tokens less than P times as likely as the likeliest "
            "(default: the bundle's, else 0, none).",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(metavar="R", help="Above 1: avoid tokens already seen (default: the bundle's, else 1)."),
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
        int | None,
        typer.Option(metavar="N", min=1, help="CPU threads (default: one for each physical core)."),
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
    conversation = chat and prompt is None and prompts is None
    nbytes = parse_size(kv_memory) if kv_memory is not None else None
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    chosen_options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    _check_options(
        chosen_options, greedy, chat, system, "--json" if as_json else "--prompts" if prompts else "", stream
    )
    from llmc.runtime.parallel.launch import SIZES

    if any(name in os.environ for name in SIZES):  # other runs say that they load before they import this
        from llmc.runtime.load import follow_if_launched

        if (code := follow_if_launched(bundle, threads)) is not None:
            raise typer.Exit(code)
    requests = [] if conversation else read_prompts(prompt, prompts)
    if requests and all(request.error for request in requests):  # there is nothing to load the bundle for
        for request in requests:
            _print_failure(Failure(request, request.error), as_json)  # type: ignore[arg-type]
        raise typer.Exit(ERROR)
    started = time.perf_counter()
    with waiting(f"loading {bundle} ..."):
        from llmc.runtime.load import load_engine
        from llmc.runtime.sampling import SamplingParams

        engine = load_engine(bundle, kv_memory=nbytes, threads=threads, fast=fast)
    if engine.tokenizer is None:
        raise RequestError(f"{bundle} has no tokenizer", "rebuild it from a checkpoint with a tokenizer.json")
    loaded = time.perf_counter() - started
    as_object = functools.partial(_print_json, bundle=bundle, loaded=loaded)
    params = replace(SamplingParams() if greedy else engine.default_params, **chosen_options)
    _note_unused(chosen_options, params, requests)
    streaming = sys.stdout.isatty() if stream is None else stream
    streaming = streaming and prompts is None and not as_json
    if conversation:
        from llmc.cli.chat import converse

        show, streaming = as_object if as_json else None, stream is not False
        if not converse(
            engine, params, system, show, limited="max_tokens" in chosen_options, streaming=streaming
        ):
            raise typer.Exit(ERROR)
        return
    answers: list[Answer] = []
    failed = False
    try:
        results = serve(engine, requests, params, chat, _print_piece if streaming else _ignore, system)
        for number, result in enumerate(results, 1):
            if isinstance(result, Failure):
                failed = True
                _print_failure(result, as_json)
                continue
            answers.append(result)
            if as_json:
                as_object(result)
            elif prompts is not None:
                _print_section(result, number, first=len(answers) == 1)
            elif not streaming:
                print(result.output.text, flush=True)
    finally:
        if streaming:
            print(flush=True)
    if answers and (allows("debug") or (sys.stderr.isatty() and allows("info"))):
        print(_statistics(answers, loaded), file=sys.stderr)
    if failed:
        raise typer.Exit(ERROR)


def _check_options(
    given: Mapping[str, Any], greedy: bool, chat: bool, system: str | None, batch: str, stream: bool | None
) -> None:
    """Raise RequestError for values that are out of range and options that exclude each other."""
    from llmc.runtime.sampling import SamplingParams

    SamplingParams(**given)
    if greedy:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if name in given:
                option = f"--{name.replace('_', '-')}"
                raise RequestError(
                    f"--greedy cannot be combined with {option}", "leave one of them out", "greedy"
                )
    if system is not None and not chat:
        raise RequestError("--system needs --chat", "add --chat, or leave --system out", "system")
    if stream and batch:
        raise RequestError(f"--stream cannot be combined with {batch}", "leave one of them out", "stream")


def _note_unused(chosen: Mapping[str, Any], params: SamplingParams, requests: Sequence[Prompt]) -> None:
    """Note the filters that have no effect because decoding is greedy.

    chosen: the options of the command line
    params: the sampling parameters that a prompt does not set itself
    """
    prompts = [request for request in requests if request.error is None]
    greedy = [prompt for prompt in prompts if replace(params, **prompt.options).temperature == 0]
    all_greedy = len(greedy) == len(prompts) if prompts else params.temperature == 0
    if all_greedy and (names := _filters(chosen)):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        note(f"{options}: no effect, because decoding is greedy. Add --temperature, such as 0.7")
    if lines := [prompt for prompt in greedy if _filters(prompt.options)]:
        more = f" ({len(lines)} such lines)" if len(lines) > 1 else ""
        fields = ", ".join(_filters(lines[0].options))
        note(f"{lines[0].where}: {fields}: no effect, because decoding is greedy. Add a temperature{more}")


def _filters(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the filters in `options` that are not turned off."""
    return [name for name, off in _FILTERS.items() if options.get(name, off) != off]


def parse_size(text: str) -> int:
    """Return a size such as "512M", "2G", "1.5GiB" or "1000" in bytes. Units are powers of 1024.

    Raises BadParameter for anything else.
    """
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


def _ignore(text: str) -> None:
    del text


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _print_section(answer: Answer, number: int, first: bool) -> None:
    name = number if answer.prompt.id is None else answer.prompt.id
    separator = "" if first else "\n"
    print(f"{separator}==> {name}: {answer.prompt.text} <==\n{answer.output.text}", flush=True)


def _print_failure(failure: Failure, as_json: bool) -> None:
    print_error(failure.error)
    if as_json:
        print_json(_id(failure.prompt), error_of(failure.error))


def _print_json(answer: Answer, *, bundle: Path, loaded: float) -> None:
    output = answer.output
    record: dict[str, Any] = {
        "bundle": str(bundle),
        **_id(answer.prompt),
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


def _id(prompt: Prompt) -> dict[str, Any]:
    return {} if prompt.id is None else {"id": prompt.id}


def _statistics(answers: Sequence[Answer], loaded: float) -> str:
    prompt_tokens = sum(answer.output.prompt_tokens for answer in answers)
    new_tokens = sum(len(answer.output.token_ids) for answer in answers)
    seconds = max(answer.seconds for answer in answers)
    first = min(answer.first_token_seconds for answer in answers)
    return (
        f"{prompt_tokens} prompt tokens, {new_tokens} new ones in {seconds:.2f} s "
        f"({new_tokens / seconds:.1f} tok/s), the first after {first * 1e3:.0f} ms; loaded in {loaded:.2f} s"
    )
