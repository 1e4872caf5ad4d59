"""A stand-in for TensorRT's engine: numpy between the attention layers, which are real plugins.

The engine of one of several ranks has some columns of the embedding, which are gathered, and some heads,
whose results are summed. Both are done by the real plugins of collectives. The engine of a stage has one of
the layers, and real plugins of transfers.

`ReferenceBackend` is the same model with the reference of attention, to compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.plugins.paged_attention import reference
from llmc.runtime.batch import Batch
from support.cuda_stand_in import StandIn
from support.gpu_bundle import (
    ATTENTION,
    CACHE,
    DV,
    HEADS,
    KV_HEADS,
    LAYERS,
    NAMES,
    OWN_HEADS,
    OWN_KV_HEADS,
    PLAN_BYTES,
    RANKS,
    SCALE,
    SCALES,
    STAGES,
    VOCAB,
    D,
    described,
    make_collective,
    make_exchange,
    make_layer,
    own_layers,
    tensors,
)


class Model:
    """The layers between the attention layers, with random weights."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def matrix(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

        self.table, self.head = matrix(VOCAB, 24) * 7, matrix(24, VOCAB)
        widths = (HEADS * D, KV_HEADS * D, KV_HEADS * DV)
        self.qkv = [[matrix(24, width) for width in widths] for _ in LAYERS]
        self.out = [matrix(HEADS * DV, 24) for _ in LAYERS]

    def keep_part(self, rank: int) -> None:
        """Keep the part of one of RANKS ranks: columns of the table and heads."""

        def part(matrix: np.ndarray, axis: int) -> np.ndarray:
            return np.split(matrix, RANKS, axis)[rank]

        self.columns = slice(rank * 24 // RANKS, (rank + 1) * 24 // RANKS)
        self.qkv = [[part(matrix, 1) for matrix in layer] for layer in self.qkv]
        self.out = [part(matrix, 0) for matrix in self.out]

    def embed(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.table[ids] + np.sin(positions[:, None] / np.arange(1, 25))

    def project(self, layer: int, x: np.ndarray) -> list[np.ndarray]:
        return [(x @ matrix).astype(np.float16) for matrix in self.qkv[layer]]


class ReferenceBackend:
    """The whole model in numpy, attention and caches included."""

    name, block_size = "reference", 32

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.model = num_blocks, Model()
        sizes = [(num_blocks, KV_HEADS, 32, width) for width in (D, DV)]
        self.caches = [[np.full(size, np.nan, CACHE) for size in sizes] for _ in LAYERS]

    def forward(self, step: Batch) -> np.ndarray:
        x = self.model.embed(step.input_ids, step.position_ids)
        tables = (step.query_start, step.past_lengths, step.block_indices, step.block_begins)
        for i, layer in enumerate(LAYERS):
            settings: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "window": layer.window}
            settings |= SCALES
            y = reference.paged_attention(
                *self.model.project(i, x), *self.caches[i], *tables, scale=SCALE, **settings
            )
            x = x + y.astype(np.float32) @ self.model.out[i]
        return (x[step.logits_index] @ self.model.head).astype(np.float32)


class StandInTensorRt:
    """TensorRT's module, in which engines are stand-ins."""

    def __init__(
        self, real: Any, gpu: StandIn, capturable: bool, most_contexts: int = 99, rank: int = 0
    ) -> None:
        self._real, self.gpu, self.capturable, self.most_contexts = real, gpu, capturable, most_contexts
        self.stage, self.rank = divmod(rank, RANKS)
        self.cache = StandInCache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, log: Any) -> Any:
        del log
        return self

    def deserialize_cuda_engine(self, data: Any) -> Any:
        assert bytes(data) == PLAN_BYTES
        return StandInEngine(self)


class StandInEngine:
    """An engine of `Model`, with the interface that the backend uses."""

    device_memory_size_v2 = 1 << 20

    def __init__(self, trt: StandInTensorRt) -> None:
        self.trt, self.model, self.contexts = trt, Model(), 0
        self.model.keep_part(trt.rank)
        self.given = {tensor.name: tensor for tensor in tensors(stage=trt.stage)}
        self.num_io_tensors = len(self.given)
        self.layers = [make_layer(trt._real, attention, SCALE) for attention in ATTENTION]
        self.own = own_layers(trt.stage)
        gathers = ["AllGather"] if trt.stage == 0 else []
        names = [*gathers, *["AllReduce"] * len(self.own)] if RANKS > 1 else []
        number = RANKS * trt.stage + trt.rank
        self.receive = self.send = None
        if trt.stage:
            fields = {"peer": number - RANKS, "sequence": 0, "width": 24, "dtype": 1}
            self.receive = make_exchange(trt._real, "Recv", **fields)
        if trt.stage < STAGES - 1:
            self.send = make_exchange(trt._real, "Send", peer=number + RANKS, sequence=0)
        self.collectives = [make_collective(trt._real, *each, RANKS) for each in enumerate(names)]

    def get_tensor_name(self, index: int) -> str:
        return list(self.given)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if self.given[name].is_input else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, self.given[name].dtype)

    def get_tensor_shape(self, name: str) -> Any:
        return self.trt.Dims(self.given[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        assert self.given[name].is_input
        return [None, None, self.trt.Dims(self.given[name].most)]

    def create_runtime_config(self) -> Any:
        return StandInConfig(self.trt.cache)

    def create_execution_context(self, config: Any) -> Any:
        if self.contexts == self.trt.most_contexts:
            return None  # the GPU has no room for it
        self.contexts += 1
        assert config.strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.cache is self.trt.cache
        config.cache.compiled.add(len(config.cache.compiled))
        return StandInContext(self, config)


class StandInCache:
    """The kernels that were compiled, a number each."""

    def __init__(self) -> None:
        self.compiled: set[int] = set()

    def serialize(self) -> memoryview:
        return memoryview(bytes(sorted(self.compiled)))

    def deserialize(self, blob: bytes) -> bool:
        self.compiled = set(blob)
        return True


class StandInConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, cache: StandInCache) -> None:
        self._new = cache

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> StandInCache:
        return self._new

    def set_runtime_cache(self, cache: StandInCache) -> bool:
        self.cache = cache
        return True


class StandInContext:
    def __init__(self, engine: StandInEngine, config: StandInConfig) -> None:
        self.engine, self.gpu = engine, engine.trt.gpu
        kinds = engine.trt.DynamicShapesKernelSpecializationStrategy
        self.one_shape = config.dynamic_shapes_kernel_specialization_strategy == kinds.EAGER
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = memory
        assert memory % 256 == 0
        assert size == self.engine.device_memory_size_v2

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return all(1 <= size <= most for size, most in zip(shape, self.engine.given[name].most, strict=True))

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 34
        engine, gpu, at, shapes = self.engine, self.gpu, dict(self.addresses), dict(self.shapes)
        assert set(at) == set(engine.given)
        assert set(shapes) == {tensor.name for tensor in engine.given.values() if tensor.is_input}
        self.seen.add(tuple(sorted(shapes.items())))
        assert not self.one_shape or len(self.seen) == 1
        (tokens,), (sequences,) = shapes["input_ids"], shapes["past_lengths"]
        if "position_ids" in shapes:
            assert shapes["position_ids"] == (tokens,)
        assert shapes["query_start"] == shapes["block_begins"] == (sequences + 1,)
        widths = {
            "x": 48,
            "query": OWN_HEADS * D,
            "key": OWN_KV_HEADS * D,
            "value": OWN_KV_HEADS * DV,
            "output": OWN_HEADS * DV,
            "columns": 48 // RANKS,
            "gathered": 48,
            "summand": 48,
        }
        place = {name: self.memory + i * (1 << 17) for i, name in enumerate(widths)}

        def array(name: str, dtype: Any = np.float16) -> np.ndarray:
            return gpu.view(place[name], dtype, (tokens, widths[name] * 2 // np.dtype(dtype).itemsize))

        def integers(name: str) -> np.ndarray:
            return gpu.view(at[name], np.int32, shapes[name])

        def embed() -> None:
            whole = engine.model.embed(integers("input_ids"), integers("position_ids"))
            array("columns", np.float32)[:] = whole[:, engine.model.columns]

        def arrange() -> None:
            parts = array("gathered" if RANKS > 1 else "columns", np.float32)
            parts = parts.reshape(RANKS, tokens, 24 // RANKS)
            array("x", np.float32)[:] = np.concatenate(list(parts), axis=1)

        def collect(number: int, source: str, target: str) -> bool:
            """Run a collective. Return False if it fails."""
            if RANKS == 1:
                return True
            plugin, _creator = engine.collectives[number]
            x = engine.trt._real.PluginTensorDesc()
            x.dims = engine.trt._real.Dims((tokens, widths[source] // 2))
            x.type = engine.trt._real.DataType.FLOAT
            try:
                plugin.enqueue([x], [], [place[source]], [place[target]], 0, stream)
            except Exception:
                return False
            return True

        def transfer(plugin: Any, kind: Any, dims: tuple[int, ...], source: int, target: int) -> bool:
            """Run a transfer. Return False if it fails."""
            x = engine.trt._real.PluginTensorDesc()
            x.dims, x.type = engine.trt._real.Dims(dims), kind
            try:
                plugin[0].enqueue([x], [], [source], [target], 0, stream)
            except Exception:
                return False
            return True

        def project(layer: int) -> None:
            for name, made in zip(
                widths, [None, *engine.model.project(layer, array("x", np.float32))], strict=False
            ):
                if made is not None:
                    array(name)[:] = made
            array("output")[:] = np.nan  # it may have held anything

        def multiply(layer: int) -> None:
            product = array("output").astype(np.float32) @ engine.model.out[layer]
            array("summand", np.float32)[:] = product

        def add() -> None:
            array("x", np.float32)[:] += array("gathered" if RANKS > 1 else "summand", np.float32)

        def head() -> None:
            chosen = array("x", np.float32)[integers("logits_index")]
            (rows,) = shapes["logits_index"]
            gpu.view(at["logits"], np.float32, (rows, VOCAB))[:] = chosen @ engine.model.head

        types, done = engine.trt._real.DataType, 0
        if engine.receive:
            if not transfer(engine.receive, types.INT32, (tokens,), at["input_ids"], place["x"]):
                return False
        else:
            gpu.submit(embed)
            if not collect(done, "columns", "gathered"):
                return False
            done += 1
            gpu.submit(arrange)
        for i in engine.own:
            plugin, _creator = engine.layers[i]
            gpu.submit(lambda i=i: project(i))
            caches = [f"key_cache.{i}", f"value_cache.{i}"]
            inputs = [place[name] for name in ("query", "key", "value")] + [at[name] for name in caches]
            inputs += [at[name] for name in NAMES[5:]]
            outputs = [place["output"], *(at[name.replace("_cache", "_cache_out")] for name in caches)]
            blocks, (entries,) = shapes[caches[0]][0], shapes["block_indices"]
            try:
                plugin.enqueue(
                    described(engine.trt._real, tokens, sequences, blocks, entries),
                    [],
                    inputs,
                    outputs,
                    0,
                    stream,
                )
            except Exception:
                return False
            gpu.submit(lambda i=i: multiply(i))
            if not collect(done, "summand", "gathered"):
                return False
            done += 1
            gpu.submit(add)
        if engine.send:
            return transfer(engine.send, types.FLOAT, (tokens, 24), place["x"], at["sent.0"])
        gpu.submit(head)
        return True
