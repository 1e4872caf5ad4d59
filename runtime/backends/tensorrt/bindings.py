"""The tensors of a TensorRT engine: their roles, and the check that they fit the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmc.plugins.collectives.spec import SENT
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES
from llmc.runtime.backends.tensorrt.stages import Place, exchanges_of
from llmc.runtime.batch import STEP_INPUTS
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.errors import BackendError

LOGITS = "logits"
# The KV cache in the manifest -> its element type in TensorRT and the bytes of an element.
_CACHES = {"fp16": ("HALF", 2), "bf16": ("BF16", 2)} | {
    cache.name: (cache.tensorrt, 1) for cache in QUANTIZED_CACHES.values()
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine."""

    #: The name in the engine.
    name: str
    #: False: it is an output.
    is_input: bool
    #: TensorRT's name of the element type.
    dtype: str
    #: The shape, with -1 for dimensions that depend on the step.
    shape: tuple[int, ...]
    #: The largest shape that the engine was built for. Inputs only.
    most: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cache:
    """The cache of a layer's keys or values. Input and output are the same memory."""

    #: The name of the input.
    input: str
    #: The name of the output.
    output: str
    #: The shape of a block, [num_kv_heads, 32, D].
    block_shape: tuple[int, ...]
    #: The size of a block in bytes.
    block_bytes: int


@dataclass(frozen=True)
class Bindings:
    """The tensors of an engine by their roles."""

    #: Array of `Batch` -> the maximum number of elements that the engine takes. A stage may lack some.
    step: Mapping[str, int]
    #: The caches of keys and values, in the order of the layers.
    caches: tuple[Cache, ...]
    #: Maximum number of blocks in a cache.
    max_blocks: int
    #: The number of logits of a row.
    vocab_size: int
    #: Whether the engine computes logits. Of a pipeline, only the last stage does.
    has_logits: bool = True
    #: The outputs of transfers to the next pipeline stage, which nobody reads.
    sent: tuple[str, ...] = ()

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block, keys and values of all layers."""
        return sum(cache.block_bytes for cache in self.caches)


def bind(tensors: Iterable[Tensor], manifest: Manifest, place: Place = Place(0, 1, 1)) -> Bindings:  # noqa: B008 (it is frozen)
    """Assign roles to an engine's tensors.

    The engine of one of several ranks has some of the KV heads of each layer, and that of a pipeline stage
    some of the layers.

    Raises BackendError, naming the first tensor that is missing, unknown or different from the manifest: the
    engine would read or write past its memory.
    """
    unassigned = {tensor.name: tensor for tensor in tensors}

    def take(name: str, is_input: bool, dtype: str, shape: tuple[int, ...]) -> Tensor:
        tensor = unassigned.pop(name, None)
        wanted = f"{'input' if is_input else 'output'} {name}, {dtype} {list(shape)}"
        if tensor is None:
            raise _unfit(f"it lacks {wanted}")
        if (tensor.is_input, tensor.dtype, tensor.shape) != (is_input, dtype, shape):
            kind = "input" if tensor.is_input else "output"
            raise _unfit(f"it has {kind} {name}, {tensor.dtype} {list(tensor.shape)}, not {wanted}")
        return tensor

    geometry = manifest.geometry
    has_logits = place.behind is None
    lacks = {name for name in ("position_ids", "logits_index") if place.pp > 1 and name not in unassigned}
    if has_logits:
        lacks.discard("logits_index")
    step = {name: take(name, True, "INT32", (-1,)).most[0] for name in STEP_INPUTS if name not in lacks}
    caches, limits = [], []
    if manifest.precision.kv_dtype not in _CACHES:
        raise _unfit(f"a KV cache of {manifest.precision.kv_dtype} has no attention kernels")
    dtype, element_bytes = _CACHES[manifest.precision.kv_dtype]
    first, stop = 0, geometry.num_layers
    if manifest.ranks is not None:
        first, stop = manifest.ranks[place.number].first, manifest.ranks[place.number].stop
    for index, layer in enumerate(geometry.layers[first:stop], first):
        heads = layer.num_kv_heads
        if manifest.parallel.tp > 1:
            given = unassigned.get(f"key_cache.{index}")
            own = given.shape[1] if given and len(given.shape) == 4 else heads
            heads = min(max(own, 1), heads)
        for kind, width in (("key", layer.head_dim), ("value", layer.v_head_dim)):
            block = (heads, geometry.block_size, width)
            name, output = f"{kind}_cache.{index}", f"{kind}_cache_out.{index}"
            limits.append(take(name, True, dtype, (-1, *block)).most[0])
            take(output, False, dtype, (-1, *block))
            nbytes = block[0] * block[1] * block[2] * element_bytes
            caches.append(Cache(name, output, block, nbytes))
    if has_logits:
        take(LOGITS, False, "FLOAT", (-1, geometry.vocab_size))
    sent = tuple(f"{SENT}{number}" for number in range(exchanges_of(manifest, place).sends))
    for name in sent:
        take(name, False, _CACHES[manifest.precision.dtype][0], (1,))
    if unassigned:
        raise _unfit(f"it has {', '.join(sorted(unassigned))}, which the model does not")
    return Bindings(step, tuple(caches), min(limits), geometry.vocab_size, has_logits, sent)


def _unfit(problem: str) -> BackendError:
    return BackendError(f"the engine is not that of its manifest: {problem}", "build the bundle again")
