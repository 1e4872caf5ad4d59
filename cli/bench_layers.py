"""`llmc bench --layers`: where the time of a prefill and of a decode step of the native engine goes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from llmc.cli.output import print_json
from llmc.cli.progress import waiting
from llmc.cli.text import table
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.bundle.reader import Bundle
    from llmc.runtime.native.profile import Layer, Peak

_STEPS = {"prefill": 3, "decode": 20}  # how often each step is timed; every decode step adds a token


def bench_layers(
    bundle: Bundle, prompt_tokens: int, sequences: int, threads: int | None, fast: bool, as_json: bool
) -> None:
    """Print the instructions of a prefill of `prompt_tokens` and of a decode step behind it.

    Raises RequestError if another engine runs the bundle, or if the context is too short.
    """
    engine = bundle.manifest.target.engine
    if engine != "native":
        raise RequestError(
            f"{bundle.name} runs on {engine}, whose layers llmc cannot time", "leave --layers out", "layers"
        )
    if bundle.manifest.parallel.world_size > 1:
        raise RequestError(
            f"{bundle.name} has several ranks, whose layers llmc cannot time", "leave --layers out", "layers"
        )
    limit = bundle.manifest.limits.max_seq_len
    if prompt_tokens + _STEPS["decode"] > limit:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and the {_STEPS['decode']} decode steps of --layers exceed the "
            f"context of {limit}",
            f"lower --prompt-tokens to {limit - _STEPS['decode']} or less",
            "prompt_tokens",
        )
    import numpy as np

    from llmc.runtime.backends.base import EngineFile, LoadOptions
    from llmc.runtime.backends.native import load
    from llmc.runtime.batch import Batch
    from llmc.runtime.cpus import engine_threads
    from llmc.runtime.load import activation_group
    from llmc.runtime.native.profile import peak, profile

    blocks_each = -(-(prompt_tokens + _STEPS["decode"]) // 32)
    options = LoadOptions(
        kv_blocks=blocks_each * sequences,
        threads=threads,
        max_tokens=prompt_tokens * sequences,
        max_sequences=sequences,
        activation_group=activation_group(bundle) if fast else None,
    )
    tables = [list(range(blocks_each * s, blocks_each * (s + 1))) for s in range(sequences)]
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, bundle.manifest.geometry.vocab_size, (sequences, prompt_tokens)).tolist()
    prefill = Batch.pack([(prompt, 0, blocks, True) for prompt, blocks in zip(prompts, tables, strict=True)])
    decode = [
        Batch.pack([([prompts[s][0]], prompt_tokens + step, tables[s], True) for s in range(sequences)])
        for step in range(_STEPS["decode"])
    ]
    with waiting(f"loading {bundle.name} ..."):
        backend = load(EngineFile.of(bundle), options)
    with waiting("measuring ..."):
        machine = peak(engine_threads(threads))
        backend.forward(prefill)
        results = {
            "prefill": profile(backend.executor, [prefill] * _STEPS["prefill"]),
            "decode": profile(backend.executor, decode),
        }
    if as_json:
        print_json(
            {
                "bundle": str(bundle.path),
                "prompt_tokens": prompt_tokens,
                "concurrency": sequences,
                "peak": asdict(machine),
                **{
                    phase: {"seconds": seconds, "layers": [asdict(layer) for layer in layers]}
                    for phase, (seconds, layers) in results.items()
                },
            }
        )
        return
    print(
        f"this machine: {machine.bytes_per_second / 1e9:.1f} GB/s read, "
        f"{machine.float_products / 1e9:,.0f} G/s multiply-adds of fp32, "
        f"{machine.integer_products / 1e9:,.0f} G/s of int8"
    )
    each = f"{sequences} x " if sequences > 1 else ""
    for phase, (seconds, layers) in results.items():
        tokens = prompt_tokens if phase == "prefill" else 1
        print(f"\n{phase} of {each}{tokens} {'tokens' if tokens > 1 else 'token'}: {seconds * 1e3:.2f} ms")
        rows: list[tuple[str, ...]] = [
            ("INSTRUCTIONS", "COUNT", "MS", "SHARE", "WEIGHTS", "OF READ", "OF ARITHMETIC")
        ]
        rows += [_row(layer, seconds, machine) for layer in layers]
        print(table(rows))


def _row(layer: Layer, seconds: float, machine: Peak) -> tuple[str, ...]:
    """Return the cells of a layer. The last two compare it with the machine's speed."""
    arithmetic = machine.integer_products if layer.integer else machine.float_products
    return (
        layer.name,
        str(layer.count),
        f"{layer.seconds * 1e3:.3f}",
        f"{layer.seconds / seconds:.0%}",
        f"{layer.weight_bytes / 1e6:.1f} MB" if layer.weight_bytes else "",
        f"{layer.weight_bytes / layer.seconds / machine.bytes_per_second:.0%}" if layer.weight_bytes else "",
        f"{layer.products / layer.seconds / arithmetic:.0%}" if layer.products else "",
    )
