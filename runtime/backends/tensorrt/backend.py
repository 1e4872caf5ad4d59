"""The TensorRT backend. llmc allocates the KV cache, and the attention plugin updates it in place."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from llmc.plugins.cuda.driver import CudaError
from llmc.plugins.cuda.kernel import KernelImage, Kernels
from llmc.plugins.paged_attention import launch, spec
from llmc.plugins.paged_attention.launcher import AttentionLauncher
from llmc.plugins.sampling.launch import MAX_K, MAX_VOCAB
from llmc.runtime.backends.base import Candidates
from llmc.runtime.backends.tensorrt import checks, sizes
from llmc.runtime.backends.tensorrt.bindings import LOGITS, bind
from llmc.runtime.backends.tensorrt.checks import Device, Step
from llmc.runtime.backends.tensorrt.cuda import Cuda, Graph
from llmc.runtime.backends.tensorrt.engine import Context, LoadedEngine
from llmc.runtime.backends.tensorrt.nccl import NcclCollectives, Neighbors, unique_id
from llmc.runtime.backends.tensorrt.sampling import TokenSampler
from llmc.runtime.backends.tensorrt.stages import (
    LOGITS_TRANSFER,
    Place,
    Rank,
    exchanges_of,
    id_of_all,
    smallest_of_all,
)
from llmc.runtime.backends.tensorrt.step import bucket_of, buckets, room
from llmc.runtime.backends.tensorrt.step_arrays import StepArrays
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import KernelFile, Manifest
from llmc.runtime.errors import BackendError

_SENT_BYTES = 256  # for an output of one number that nobody reads


class TensorRtBackend:
    """A TensorRT engine, its attention kernels and its paged KV cache, on one GPU. See also `StageBackend`.

    Steps with one new token per sequence run as CUDA graphs, from the second step of each bucket (`step.py`).
    Other steps are launched kernel by kernel. TensorRT requires a separate context for each graph. All
    contexts share their memory.
    """

    block_size = spec.BLOCK_SIZE

    def __init__(
        self, manifest: Manifest, directory: Path, device: Device, step: Step, kv_memory: int | None,
        rank: Rank | None = None,
    ) -> None:  # fmt: skip
        """Load a bundle in which `checks.faults` finds no fault. Raises as `tensorrt.load` does.

        rank: which one of several ranks this is; None: there is one
        """
        self.name: str = manifest.target.engine
        self._owned = contextlib.ExitStack()  # everything to free, in reverse order
        self._contexts: list[Context] = []
        self._graphs: list[Graph] = []
        self._decoders: dict[int, Callable[[], None]] = {}
        self._sampler: TokenSampler | None = None
        self._collectives: NcclCollectives | None = None
        self._place = rank.place if rank else Place(0, 1, 1)
        self._communicator = rank.communicator if rank else None
        try:
            with _as_backend_error("cannot load the engine"):
                self._load(manifest, directory, device, step, kv_memory, rank)
            self._warm_up(min(2, step.max_tokens))
            self._engine.keep_compiled()
            self._owned.callback(self._engine.keep_compiled)  # later steps compile more
        except BaseException:
            self.close()
            raise

    def _load(
        self, manifest: Manifest, directory: Path, device: Device, step: Step, kv_memory: int | None,
        rank: Rank | None,
    ) -> None:  # fmt: skip
        assert manifest.gpu is not None
        file, geometry = manifest.engines[self._place.number].file, manifest.geometry
        cuda = self._cuda = Cuda(rank.gpu if rank else 0)
        self._owned.callback(cuda.close)  # freed in reverse order: graphs, contexts, engine, kernels, memory
        chosen = checks.choose_kernels(manifest.gpu.kernels, device)
        kernels = Kernels((_image(directory, file) for file in chosen), launch.ARGUMENTS)
        self._owned.callback(kernels.close)
        engine = self._engine = LoadedEngine(
            checks.MODULES[manifest.target.engine],
            directory / file,
            manifest.files[file].sha256,
            device,
        )
        self._owned.callback(engine.close)
        table = bind(engine.tensors(), manifest, self._place)
        if rank:
            self._collectives = self._meet(manifest, rank)
            own = [cache.block_shape[0] for cache in table.caches[::2]]
            if manifest.ranks:
                record = manifest.ranks[self._place.number]
                geometry = replace(geometry, layers=geometry.layers[record.first : record.stop])
            geometry = sizes.geometry_of_rank(geometry, own, self._place.tp)
        self._owned.callback(self._contexts.clear)

        self._max_seq_len = manifest.limits.max_seq_len
        maximum = room(step.max_tokens, step.max_sequences, self._max_seq_len)
        if small := [name for name, most in table.step.items() if maximum[name] > most]:
            raise BackendError(
                f"the engine takes {table.step[small[0]]} {small[0]}, {maximum[small[0]]} are asked for",
                "lower max_batch_tokens or max_sequences",
            )
        self._step_arrays = StepArrays(cuda, maximum)
        self._step_inputs = tuple(table.step)
        self._addresses = {name: self._step_arrays.addresses[name] for name in self._step_inputs}
        logits_bytes = 4 * step.max_sequences * table.vocab_size
        #: Of the last stage, and of rank 0.
        self._logits = np.empty((0, table.vocab_size), np.float32)
        if table.has_logits or self._place.number == 0:
            self._logits = cuda.pinned(logits_bytes).view(np.float32).reshape(-1, table.vocab_size)
        if table.has_logits:
            self._addresses[LOGITS] = cuda.allocate(logits_bytes)
        if table.sent:
            self._addresses |= dict.fromkeys(table.sent, cuda.allocate(_SENT_BYTES))
        sampling = checks.choose_sampling_kernels(manifest.gpu.kernels, device)
        if sampling and table.vocab_size <= MAX_VOCAB and self._place.pp == 1:
            images = (_image(directory, file) for file in sampling)
            self._sampler = TokenSampler(cuda, images, self._addresses[LOGITS], self._logits)
            self._owned.callback(self._sampler.close)
        self.max_candidates = MAX_K if self._sampler else 0

        self._activations = cuda.allocate(engine.activation_bytes)
        kernel_sm = chosen[0].sm
        scratch = sizes.scratch_bytes(
            geometry, step.max_sequences, self._max_seq_len, manifest.precision, kernel_sm,
            device.multiprocessors,
        )  # fmt: skip
        self._launcher = AttentionLauncher(
            kernels, kernel_sm, device.multiprocessors, cuda.allocate(scratch), scratch
        )
        self._buckets = buckets(step.max_sequences)
        context = engine.context(self._activations, one_shape=False)
        self._contexts.append(context)

        # The KV cache gets the remaining memory.
        free, total = cuda.free_memory()
        if kv_memory is not None and rank:
            kv_memory //= self._place.size
        self.num_blocks = sizes.cache_blocks(
            table.block_bytes, free=free, total=total, kv_memory=kv_memory, useful=maximum["block_indices"],
            most=table.max_blocks,
        )  # fmt: skip
        if rank:
            self.num_blocks = smallest_of_all(self.num_blocks, rank.communicator, self._place)
        self._fixed_shapes: dict[str, tuple[int, ...]] = {"block_indices": (maximum["block_indices"],)}
        for cache in table.caches:
            address = cuda.allocate(self.num_blocks * cache.block_bytes)
            self._addresses |= {cache.input: address, cache.output: address}
            self._fixed_shapes[cache.input] = (self.num_blocks, *cache.block_shape)
        context.bind(self._addresses, self._fixed_shapes)
        self._owned.callback(_drop, self._graphs)

    def _meet(self, manifest: Manifest, rank: Rank) -> NcclCollectives:
        """Return the communicators of this rank on the GPUs. Raises BackendError and RankError."""
        communicator, nccl, place = rank.communicator, rank.nccl, self._place
        count, neighbors = exchanges_of(manifest, place), None
        if place.pp > 1:
            everyone = id_of_all(nccl, communicator, place)
            neighbors = Neighbors(
                everyone, place.number, place.size, place.before, count.receives, place.behind, count.sends
            )
        identity = unique_id(nccl, communicator) if place.tp > 1 else b""
        collectives = NcclCollectives(
            nccl, communicator.size, communicator.rank, identity, count.collectives, self._cuda.make_current,
            neighbors=neighbors,
        )  # fmt: skip
        self._owned.callback(collectives.close)
        return collectives

    def forward(self, batch: Batch) -> np.ndarray:
        """Return logits, float32 [N, vocab], for `batch.logits_index`. They are valid until the next call.

        Nobody reads those of a rank above 0, which returns an array with other contents.
        """
        self.begin(batch)
        rows = len(batch.logits_index)
        return self._logits[:rows] if self._place.number else self.finish(0, rows)

    def begin(self, batch: Batch) -> None:
        """See `StageBackend`. Returns when the GPU has computed this stage's part of the step.

        Sending waits for the next stage, which may still compute the step before.
        """
        logits = self._logits[: len(batch.logits_index)]
        owns_logits = self._place.number == self._place.owner
        with self._step():
            self._run(batch)
            if len(logits) and owns_logits:
                self._cuda.download(self._addresses[LOGITS], logits)
        if owns_logits and self._place.number:
            assert self._communicator is not None
            self._communicator.send(logits, 0, LOGITS_TRANSFER)

    def finish(self, first: int, rows: int) -> np.ndarray:
        """See `StageBackend`. Without stages, the logits of `begin` are there."""
        if first + rows > len(self._logits):
            raise BackendError(
                f"a step of {first + rows} rows of logits, the engine was loaded for {len(self._logits)}",
                "raise max_sequences",
            )
        if self._place.owner:
            assert self._communicator is not None
            self._communicator.receive(self._logits[first : first + rows], self._place.owner, LOGITS_TRANSFER)
        return self._logits[: first + rows]

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Run a step, and wait until everything on the stream is done.

        The next step fills the pinned arrays: no copy may still read them. After an error of one of several
        ranks its collectives are ended: they may wait for others forever.
        """
        with _as_backend_error("the step failed"):
            self._cuda.make_current()
            try:
                yield
                self._wait()
            except BaseException:
                self._end_collectives()
                self._cuda.wait()
                raise

    def forward_sampled(self, batch: Batch, k: int) -> list[Candidates]:
        """Return the candidates of each row in `batch.logits_index`. See `SamplingBackend`."""
        assert self._sampler is not None  # k is at most max_candidates
        rows = len(batch.logits_index)
        with self._step():
            self._run(batch)
            return self._sampler.candidates(rows, k) if rows else []

    def _run(self, batch: Batch) -> None:
        bucket = bucket_of(batch, self._buckets)
        lengths = self._step_arrays.upload(batch, bucket)
        if bucket is None:
            self._launcher.begin(batch.query_start, batch.past_lengths)
            self._contexts[0].bind({}, self._step_shapes(lengths))
            self._contexts[0].run(self._launcher, self._cuda.stream, self._collectives)
        elif bucket in self._decoders:
            self._decoders[bucket]()
        else:
            self._decoders[bucket] = self._first_decode(bucket, lengths)

    def _first_decode(self, bucket: int, lengths: dict[str, int]) -> Callable[[], None]:
        """Run the first step of a bucket. Return the call that runs the next ones: a graph, if possible.

        In the first run TensorRT and CUDA compile and load whatever they cannot during a capture. If the GPU
        has no memory for a separate context, the bucket's steps run in the context that takes every shape.
        """
        shapes = self._step_shapes(lengths)
        longest = sizes.longest_decode(bucket, self._max_seq_len)

        def run(context: Context) -> None:
            self._launcher.begin(*longest)
            context.run(self._launcher, self._cuda.stream, self._collectives)

        def run_in_general() -> None:
            self._contexts[0].bind({}, shapes)
            run(self._contexts[0])

        try:
            context = self._engine.context(self._activations, one_shape=True)
            context.bind(self._addresses, {**self._fixed_shapes, **shapes})
            run(context)
            self._wait()  # TensorRT's deferred work must be done before a capture
        except (BackendError, CudaError) as error:
            if self._collectives:
                raise  # the other ranks have run this step: it cannot be repeated here alone
            _warn_without_graph(bucket, str(error))
            run_in_general()
            return run_in_general
        self._contexts.append(context)
        reason = "TensorRT cannot run this engine in one"
        if context.can_be_captured(self._cuda.stream):
            try:
                graph = self._cuda.capture(partial(run, context))
            except (BackendError, CudaError) as error:
                reason = str(error)
            else:
                self._graphs.append(graph)
                return graph.launch
        _warn_without_graph(bucket, reason)
        return partial(run, context)

    def _step_shapes(self, lengths: dict[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the engine's inputs that a step changes."""
        return {name: (lengths[name],) for name in self._step_inputs if name != "block_indices"}

    def _wait(self) -> None:
        if self._collectives:
            self._collectives.wait(self._cuda.is_done)
        else:
            self._cuda.wait()

    def _end_collectives(self) -> None:
        """End collectives that wait for other ranks, which may have ended.

        The graphs go first: NCCL waits for those that have its collectives.
        """
        if self._collectives:
            _drop(self._graphs)
            self._collectives.close()

    def _warm_up(self, tokens: int) -> None:
        """Run a prefill and a decode step over the unused cache.

        So errors of the engine or the kernels are raised at load time, and code that is compiled at first use
        is ready for the first request.
        """
        for count in (tokens, 1):
            self.forward(Batch.pack([([0] * count, 0, [0], True)]))
        if self._sampler:
            with _as_backend_error("the sampling kernels failed"):
                for k in (1, 2):  # both pairs of kernels, on the logits of the last step
                    self._sampler.candidates(1, k)

    def close(self) -> None:
        """Free all memory on the GPU and TensorRT's objects. The backend cannot be used afterwards."""
        owned = self._owned.pop_all()  # a second call does nothing
        self._decoders.clear()
        with _as_backend_error("could not free the GPU's memory"), owned:
            if self._contexts:
                self._cuda.make_current()
                self._end_collectives()
                self._cuda.wait()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _drop(graphs: list[Graph]) -> None:
    while graphs:
        graphs.pop().close()


def _warn_without_graph(bucket: int, reason: str) -> None:
    warnings.warn(f"steps of {bucket} sequences go without a CUDA graph: {reason}", stacklevel=3)


def _image(directory: Path, file: KernelFile) -> KernelImage:
    image = (directory / file.file).read_bytes()
    return KernelImage(file.variant, file.entry, image, file.shared_memory, file.num_warps)


@contextlib.contextmanager
def _as_backend_error(failure: str) -> Iterator[None]:
    """Raise errors of CUDA, of the launcher and of TensorRT's Python module as BackendError.

    RuntimeError is the base class of CudaError and the type that TensorRT raises. The message is one line.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise BackendError(
            f"{failure}: {' '.join(str(error).split())}", "set LLMC_TRACEBACK=1 for where"
        ) from error
