"""The native backend: llmc's own CPU engine runs the bundle's program."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.plugins.cpu.library import CACHES
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.backends.base import Candidates, EngineFile, LoadOptions
from llmc.runtime.backends.kv_cache import cpu_blocks
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.strict_json import DAMAGED
from llmc.runtime.cpus import engine_threads
from llmc.runtime.errors import BackendError, BundleError
from llmc.runtime.native.executor import Executor
from llmc.runtime.native.program import Cache, Program
from llmc.runtime.native.weights import start_reading

EXACT_DIGITS, _FAST_DIGITS = 3, 1


def load(engine: EngineFile, options: LoadOptions) -> NativeBackend:
    """Load a program. `activation_group`: layers with integer weights quantize their activations to int8.

    Raises BackendError if this machine has no native engine or the engine no such cache, BundleError for a
    damaged program, and RequestError for a KV cache that does not fit.
    """
    if engine.kv_dtype not in CACHES:
        raise BackendError(
            f"the native engine has no KV cache of {engine.kv_dtype}", "build the bundle without --kv-dtype"
        )
    return NativeBackend(engine, cpu_blocks(engine, options), options)


class NativeBackend:
    """A program, its weights and its paged KV cache of `num_blocks` blocks of 32 tokens."""

    name = "native"
    block_size = BLOCK_SIZE

    def __init__(self, engine: EngineFile, num_blocks: int, options: LoadOptions) -> None:
        ranks = options.communicator.size if options.communicator else 1
        rank = engine.rank if options.communicator else None
        file = engine.weights or start_reading(engine.path, rank)
        program = Program.from_json(engine.path.read_bytes())
        if program.ranks != ranks:
            raise BundleError(f"{engine.path.name} is the program of one of {program.ranks} ranks", DAMAGED)
        if engine.kv_dtype == "int8" and any(not cache.v_head_dim for cache in program.caches):
            raise BundleError("the program has latent keys, which have no cache of int8", DAMAGED)
        if engine.bundle is not None:
            _check_manifest(program, engine.bundle.manifest)
        weights, self._memory = file.arrays(program)
        self.num_blocks = num_blocks
        try:
            self.executor = Executor(
                program,
                weights,
                max_tokens=options.max_tokens,
                num_blocks=num_blocks,
                threads=engine_threads(options.threads),
                kv_dtype=engine.kv_dtype,
                digits=EXACT_DIGITS if options.activation_group is None else _FAST_DIGITS,
                communicator=options.communicator,
            )
        except OSError as error:
            raise BackendError(
                f"the native engine cannot run here: {error}", "build the bundle with `--engine openvino`"
            ) from error

    def forward(self, batch: Batch) -> np.ndarray:
        """Return logits, float32 [N, vocab], for `batch.logits_index`. They are valid until the next call."""
        try:
            return self.executor.run(batch)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def begin(self, batch: Batch) -> None:
        """See `StageBackend`."""
        self.begin_sampled(batch, 0)

    def begin_sampled(self, batch: Batch, k: int) -> None:
        """See `ExchangingBackend`."""
        try:
            self.executor.begin(batch, k=k)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def finish(self, first: int, rows: int) -> np.ndarray:
        """See `StageBackend`."""
        return self.executor.finish(first, rows)

    @property
    def max_exchanged(self) -> int:
        """See `ExchangingBackend`."""
        return self.executor.max_exchanged

    def finish_sampled(self, rows: int, k: int) -> list[Candidates]:
        """See `ExchangingBackend`."""
        return [Candidates(*row) for row in self.executor.finish_sampled(rows, k)]

    def close(self) -> None:
        """End the engine's threads."""
        self.executor.close()


def _same_caches(program: Program, layers: list[Cache]) -> bool:
    """Return whether the program has the caches of these layers. A rank may have some of their heads.

    layers: as many as the program has
    """
    if program.ranks > 1:
        layers = [
            replace(layer, num_kv_heads=min(layer.num_kv_heads, mine.num_kv_heads))
            for layer, mine in zip(layers, program.caches, strict=True)
        ]
    return list(program.caches) == layers


def _check_manifest(program: Program, manifest: Manifest) -> None:
    """Raise BundleError if the manifest, which sizes the KV cache, is not that of the program."""
    geometry = manifest.geometry
    layers = [Cache(layer.num_kv_heads, layer.head_dim, layer.v_head_dim) for layer in geometry.layers]
    count = len(program.caches)
    stages = range(len(layers) - count + 1) if manifest.parallel.pp > 1 else range(count == len(layers))
    if not any(_same_caches(program, layers[first : first + count]) for first in stages):
        raise BundleError("the program has other KV caches than the layers of the manifest", DAMAGED)
    if program.vocab_size != geometry.vocab_size:
        raise BundleError("the program has another vocabulary than the manifest", DAMAGED)
    if 0 < program.max_positions < manifest.limits.max_seq_len:
        raise BundleError("the program has fewer positions than the context of the manifest", DAMAGED)
