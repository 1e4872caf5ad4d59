"""The tensors of a TensorRT engine: what each is for, and whether they are those of the bundle's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES
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
    """An input or output of an engine. dtype: TensorRT's name; shape: -1 for what a step decides;
    most: the largest shape that the engine was built for (inputs only)."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    most: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cache:
    """A layer's keys or values: input and output are the same memory."""

    input: str
    output: str
    block_shape: tuple[int, ...]  # [num_kv_heads, 32, D]
    block_bytes: int


@dataclass(frozen=True)
class Bindings:
    """step: for each array of `Batch`, the elements that the engine takes at most; max_blocks: a cache's."""

    step: Mapping[str, int]
    caches: tuple[Cache, ...]
    max_blocks: int
    vocab_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers, keys and values."""
        return sum(cache.block_bytes for cache in self.caches)


def bind(tensors: Iterable[Tensor], manifest: Manifest) -> Bindings:
    """Sorts an engine's tensors. Raises BackendError naming the first that is missing, unknown or not as
    the manifest says: the engine would read or write past its memory."""
    given = {tensor.name: tensor for tensor in tensors}

    def take(name: str, is_input: bool, dtype: str, shape: tuple[int, ...]) -> Tensor:
        tensor = given.pop(name, None)
        wanted = f"{'input' if is_input else 'output'} {name}, {dtype} {list(shape)}"
        if tensor is None:
            raise _unfit(f"it lacks {wanted}")
        if (tensor.is_input, tensor.dtype, tensor.shape) != (is_input, dtype, shape):
            kind = "input" if tensor.is_input else "output"
            raise _unfit(f"it has {kind} {name}, {tensor.dtype} {list(tensor.shape)}, not {wanted}")
        return tensor

    geometry = manifest.geometry
    step = {name: take(name, True, "INT32", (-1,)).most[0] for name in STEP_INPUTS}
    caches, limits = [], []
    if manifest.precision.kv_dtype not in _CACHES:
        raise _unfit(f"a KV cache of {manifest.precision.kv_dtype} has no attention kernels")
    dtype, element_bytes = _CACHES[manifest.precision.kv_dtype]
    for index, layer in enumerate(geometry.layers):
        for kind, width in (("key", layer.head_dim), ("value", layer.v_head_dim)):
            block = (layer.num_kv_heads, geometry.block_size, width)
            name, output = f"{kind}_cache.{index}", f"{kind}_cache_out.{index}"
            limits.append(take(name, True, dtype, (-1, *block)).most[0])
            take(output, False, dtype, (-1, *block))
            nbytes = block[0] * block[1] * block[2] * element_bytes
            caches.append(Cache(name, output, block, nbytes))
    take(LOGITS, False, "FLOAT", (-1, geometry.vocab_size))
    if given:
        raise _unfit(f"it has {', '.join(sorted(given))}, which the model does not")
    return Bindings(step, tuple(caches), min(limits), geometry.vocab_size)


def _unfit(what: str) -> BackendError:
    return BackendError(f"the engine is not that of its manifest: {what}", "build the bundle again")
