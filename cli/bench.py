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
from llmc.cli.text import size, table
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.bundle.manifest import Manifest
    from llmc.runtime.engine import Engine

RUNS = 3


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


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to measure.")],
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate for each.")] = 64,
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
    from llmc.runtime.load import load_engine

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    limit = manifest.limits.max_seq_len
    if prompt_tokens + new_tokens > limit:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the context of {limit}",
            f"lower --prompt-tokens or --new-tokens to {limit} in all",
            "prompt_tokens",
        )
    if layers:
        from llmc.cli.bench_layers import bench_layers

        bench_layers(opened, prompt_tokens, concurrency, threads, fast, as_json)
        return
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
    median = Measurement(*(statistics.median(column) for column in zip(*map(_row, runs), strict=True)))
    machine = Machine.this()
    if as_json:
        print_json(
            {
                "bundle": str(opened.path),
                "source": manifest.source.name,
                "engine": manifest.target.engine,
                "precision": asdict(manifest.precision),
                "weights": weight_format(manifest),
                "activations": "int8"
                if fast
                else _quantized_activations(manifest) or manifest.precision.dtype,
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "concurrency": concurrency,
                "threads": threads,
                "load_seconds": loaded,
                "preemptions": engine.stats.preemptions,
                "median": asdict(median),
                "runs": [asdict(run) for run in runs],
                "machine": asdict(machine),
            }
        )
        return
    each = f"{concurrency} x " if concurrency > 1 else ""
    facts = [
        ("bundle", f"{opened.name}: {manifest.target.engine}"),
        ("mode", _mode(manifest, fast)),
        ("machine", f"{machine.cpu}, {machine.cores} cores, {threads or 'default'} threads"),
        ("memory", f"{size(machine.memory)}" if machine.memory else "unknown"),
        ("load", f"{loaded:.2f} s"),
        ("workload", f"{each}{prompt_tokens} prompt tokens, {new_tokens} new ones; median of {RUNS} runs"),
        ("first token", f"{median.first_token_seconds * 1e3:.1f} ms"),
        ("prefill", f"{median.prefill_tokens_per_second:,.0f} tok/s"),
        ("decode", f"{median.decode_tokens_per_second:,.1f} tok/s"),
        ("whole run", f"{median.seconds:.3f} s{_spread([run.seconds for run in runs])}"),
    ]
    if engine.stats.preemptions:
        facts.append(("preemptions", f"{engine.stats.preemptions}: the KV cache is too small for this load"))
    print(table(facts))


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
    generated = last_first = 0.0
    tokens_at_last_first = 0.0
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


def _quantized_activations(manifest: Manifest) -> str:
    """Return the element type that the bundle quantizes its activations to, or ""."""
    return ", ".join((manifest.quantization or {}).get("activations", ()))


def _mode(manifest: Manifest, fast: bool) -> str:
    how = f"{manifest.precision.dtype} activations, not quantized"
    if element := _quantized_activations(manifest):
        how = f"activations quantized to {element} as built, the rest in {manifest.precision.dtype}"
    if fast:
        rest = ", the rest in bf16 where the CPU can" if manifest.precision.kv_dtype == "u8" else ""
        how = f"fast: activations quantized to int8{rest}"
    return f"{how}; weights {weight_format(manifest)}, KV cache {manifest.precision.kv_dtype}"


def _row(measurement: Measurement) -> tuple[float, ...]:
    return tuple(asdict(measurement).values())


def _spread(values: list[float]) -> str:
    return f" ({min(values):.3f} to {max(values):.3f})"
