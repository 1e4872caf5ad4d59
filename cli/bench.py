"""`llmc bench`: measure how fast a bundle is on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.machine import Machine
from llmc.cli.output import Json, print_json
from llmc.cli.progress import waiting
from llmc.cli.text import count, size, table
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.bundle.manifest import Manifest
    from llmc.runtime.bundle.reader import Bundle
    from llmc.runtime.engine import Engine

RUNS = 3
NEW_TOKENS = 64


@dataclass(frozen=True)
class Measurement:
    """The measurements of one run, in which `concurrency` prompts arrive together."""

    #: Time from the arrival of the prompts to the last generated token.
    seconds: float
    #: Time to first token, averaged over the prompts.
    first_token_seconds: float
    #: Number of prompt tokens / time until every prompt has its first token.
    prefill_tokens_per_second: float
    #: Number of tokens generated after that time / time that they took.
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Result:
    """The runs of one workload, and what they depend on."""

    bundle: Bundle
    #: Tokens of each prompt.
    prompt_tokens: int
    #: Tokens generated for each prompt.
    new_tokens: int
    #: The number of prompts.
    concurrency: int
    #: CPU threads; None for the default.
    threads: int | None
    fast: bool
    load_seconds: float
    #: How often the KV cache was too small.
    preemptions: int
    runs: list[Measurement]

    @property
    def median(self) -> Measurement:
        """The median of each figure."""
        columns = zip(*(asdict(run).values() for run in self.runs), strict=True)
        return Measurement(*map(statistics.median, columns))


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to measure.")],
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help=f"Tokens to generate for each (default: {NEW_TOKENS})."),
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts served at once.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="CPU threads (default: one for each physical core)."),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Quantize activations to int8 (int8 and int4 bundles); this changes the output."
        ),
    ] = False,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Show where the time of a prefill and of a decode step goes (native engine)."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure time to first token, prefill and decode speed.

    The prompts are random, decoding is greedy, and the prefix cache is off. The figures are the median of
    three runs after one to warm up.

    With --layers the instructions of one step are timed instead, and compared with the speed of memory and
    arithmetic that this machine reaches at most.

    \b
    Examples:
      llmc bench tales.llmc
      llmc bench tales.llmc --concurrency 4 --new-tokens 128
      llmc bench tales.llmc --layers --prompt-tokens 512
    """
    from llmc.runtime.bundle.reader import Bundle
    from llmc.runtime.load import follow_if_launched, load_engine

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if layers:
        from llmc.cli.bench_layers import bench_layers

        if new_tokens is not None:
            raise RequestError("--new-tokens has no effect with --layers", "leave one out", "new_tokens")
        bench_layers(opened, prompt_tokens, concurrency, threads, fast, as_json)
        return
    new_tokens = NEW_TOKENS if new_tokens is None else new_tokens
    limit = manifest.limits.max_seq_len
    if prompt_tokens + new_tokens > limit:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the context of {limit}",
            f"lower --prompt-tokens or --new-tokens to {limit} in all",
            "prompt_tokens",
        )
    if (code := follow_if_launched(opened, threads)) is not None:
        raise typer.Exit(code)
    started = time.perf_counter()
    with waiting(f"loading {bundle} ..."):
        engine = load_engine(
            opened, threads=threads, max_sequences=concurrency, prefix_cache=False, fast=fast
        )
    loaded = time.perf_counter() - started
    vocabulary = manifest.geometry.vocab_size
    with waiting("measuring ..."):
        measure(engine, vocabulary, prompt_tokens, new_tokens, concurrency)
        runs = [measure(engine, vocabulary, prompt_tokens, new_tokens, concurrency) for _ in range(RUNS)]
    result = Result(
        bundle=opened,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        concurrency=concurrency,
        threads=threads,
        fast=fast,
        load_seconds=loaded,
        preemptions=engine.stats.preemptions,
        runs=runs,
    )
    if as_json:
        _print_json(result)
    else:
        _print_table(result)


def measure(
    engine: Engine, vocab_size: int, prompt_tokens: int, new_tokens: int, concurrency: int
) -> Measurement:
    """Serve `concurrency` random prompts at once and measure the times.

    vocab_size: the number of token ids to draw from
    prompt_tokens: the length of each prompt
    new_tokens: the number of tokens to generate for each
    """
    import numpy as np

    from llmc.runtime.sampling import SamplingParams

    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    prompts = [rng.integers(0, vocab_size, prompt_tokens).tolist() for _ in range(concurrency)]
    started = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, params)
    first: dict[str, float] = {}
    generated = tokens_at_last_first = 0
    last_first = 0.0
    while engine.has_unfinished:
        outputs = engine.step()
        now = time.perf_counter() - started
        generated += len(outputs)
        for output in outputs:
            if output.request_id not in first:
                first[output.request_id] = last_first = now
                tokens_at_last_first = generated
    seconds = time.perf_counter() - started
    return Measurement(
        seconds=seconds,
        first_token_seconds=statistics.fmean(first.values()),
        prefill_tokens_per_second=prompt_tokens * concurrency / last_first,
        decode_tokens_per_second=(generated - tokens_at_last_first) / (seconds - last_first),
    )


def weight_format(manifest: Manifest) -> str:
    """Return the format of the weights of linear layers."""
    return str((manifest.quantization or {}).get("format", manifest.source.dtype))


def _print_json(result: Result) -> None:
    manifest = result.bundle.manifest
    print_json(
        {
            "bundle": str(result.bundle.path),
            "source": manifest.source.name,
            "engine": manifest.target.engine,
            "precision": asdict(manifest.precision),
            "weights": weight_format(manifest),
            "activations": _activations(manifest, result.fast)[0],
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": result.new_tokens,
            "concurrency": result.concurrency,
            "threads": result.threads,
            "load_seconds": result.load_seconds,
            "preemptions": result.preemptions,
            "median": asdict(result.median),
            "runs": [asdict(run) for run in result.runs],
            "machine": asdict(Machine.current()),
        }
    )


def _print_table(result: Result) -> None:
    manifest, median, machine = result.bundle.manifest, result.median, Machine.current()
    each = f"{result.concurrency} x " if result.concurrency > 1 else ""
    workload = f"{each}{result.prompt_tokens} prompt tokens, {result.new_tokens} new ones"
    mode = (
        f"{_activations(manifest, result.fast)[1]}; weights {weight_format(manifest)}, "
        f"KV cache {manifest.precision.kv_dtype}"
    )
    seconds = [run.seconds for run in result.runs]
    facts = [
        ("bundle", f"{result.bundle.name}: {manifest.target.engine}"),
        ("mode", mode),
        (
            "machine",
            f"{machine.cpu}, {count(machine.cores, 'logical CPU')}, {result.threads or 'default'} threads",
        ),
        ("memory", size(machine.memory) if machine.memory else "unknown"),
        ("load", f"{result.load_seconds:.2f} s"),
        ("workload", f"{workload}; median of {RUNS} runs"),
        ("first token", f"{median.first_token_seconds * 1e3:.1f} ms"),
        ("prefill", f"{median.prefill_tokens_per_second:,.0f} tok/s"),
        ("decode", f"{median.decode_tokens_per_second:,.1f} tok/s"),
        ("whole run", f"{median.seconds:.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"),
    ]
    if result.preemptions:
        facts.append(("preemptions", f"{result.preemptions}: the KV cache is too small for this load"))
    print(table(facts))


def _activations(manifest: Manifest, fast: bool) -> tuple[str, str]:
    """Return the element type of the inputs of linear layers, and the same as a phrase with its reason."""
    dtype = manifest.precision.dtype
    if fast:
        rest = ", the rest in bf16 where the CPU can" if manifest.precision.kv_dtype == "u8" else ""
        return "int8", f"fast: activations quantized to int8{rest}"
    if quantized := ", ".join((manifest.quantization or {}).get("activations", ())):
        return quantized, f"activations quantized to {quantized} as built, the rest in {dtype}"
    return dtype, f"{dtype} activations, not quantized"
