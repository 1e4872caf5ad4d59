"""`llmc.PagedAttention` as a TensorRT plugin in Python. It describes shapes and memory to the builder.

One class implements core, build and runtime (`IPluginV3`). Its creator makes it from the node's attributes,
or from the fields stored in an engine. `make_plugin` takes the module, because `tensorrt_rtx` and `tensorrt`
have the same classes and a process uses one of them. The caches are updated in place: outputs 1 and 2 alias
inputs 3 and 4, for which the builder needs `PreviewFeature.ALIASED_PLUGIN_IO_10_03`.

Plugins hold no kernels. The caller that runs an engine provides a launcher for the call (`use_launcher`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmc.plugins.lent import Lent
from llmc.plugins.paged_attention.launch import Attention
from llmc.plugins.paged_attention.spec import ABI_VERSION, DOMAIN, NAME, QUANTIZED_CACHES
from llmc.plugins.tensorrt_plugin import Plugin, add_creator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMESPACE = DOMAIN
VERSION = str(ABI_VERSION)
_QUERY, _KEY_CACHE, _VALUE_CACHE = 0, 3, 4
_INPUTS, _OUTPUTS = 9, 3
_PAST_LENGTHS = 6
_INPUT_NAMES = (
    "query", "key", "value", "key_cache", "value_cache",
    "query_start", "past_lengths", "block_indices", "block_begins",
)  # fmt: skip
_STEP_INPUTS = range(5, 9)  # int32; all others but the caches have the model's dtype
_ALIASES = {1: _KEY_CACHE, 2: _VALUE_CACHE}
# All four have one dtype, the model's or a quantized cache's. Outputs are numbered after the inputs.
_CACHES = (_KEY_CACHE, _VALUE_CACHE, *(_INPUTS + output for output in _ALIASES))


@dataclass(frozen=True)
class Attributes:
    """The node's attributes, as `spec.py` defines them."""

    num_heads: int
    num_kv_heads: int
    scale: float
    window: int
    softcap: float
    key_scale: float = 1.0
    value_scale: float = 1.0

    @classmethod
    def read(cls, given: Mapping[str, int | float]) -> Attributes:
        """Read a node's or an engine's fields.

        Raises ValueError for fields that are missing, unknown or out of range.
        """
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(needed - given.keys()):
            raise ValueError(f"{DOMAIN}.{NAME} lacks {', '.join(missing)}")
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"{DOMAIN}.{NAME} of ABI {VERSION} does not know {', '.join(unknown)}")
        heads, kv_heads, window = (int(given[name]) for name in ("num_heads", "num_kv_heads", "window"))
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads")
        scales = [float(given.get(name, 1.0)) for name in ("key_scale", "value_scale")]
        if not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(f"scales of a cache must be positive: {scales}")
        return cls(heads, kv_heads, float(given["scale"]), window, float(given["softcap"]), *scales)

    def stored(self) -> dict[str, int | float]:
        """Return the fields that an engine stores: all but defaults, which engines of older versions lack."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


class Launcher(Protocol):
    """The launcher that a plugin needs to run, such as `launcher.AttentionLauncher`."""

    def launch(
        self, attention: Attention, dtype: str, scale: float, tensors: Mapping[str, int], tokens: int,
        sequences: int, stream: int, kv_dtype: str | None, kv_scales: tuple[float, float],
    ) -> None: ...  # fmt: skip


_launcher: Lent[Launcher] = Lent(f"{DOMAIN}.{NAME} has no kernels in this process and cannot launch")
#: Let engines that this thread runs in the `with` block launch their attention through this launcher.
use_launcher = _launcher.lend


@functools.cache
def register(trt: Any) -> Any:
    """Register the plugin with the TensorRT module `trt`, once in a process. Return its creator.

    Raises RuntimeError if another plugin has this name.
    """
    creator = make_plugin(trt)
    add_creator(trt, creator)
    return creator


@functools.cache
def _attention(attributes: Attributes, head_dim: int, v_head_dim: int) -> Attention:
    heads, kv_heads = attributes.num_heads, attributes.num_kv_heads
    return Attention(heads, kv_heads, head_dim, v_head_dim, attributes.window, attributes.softcap)


def make_plugin(trt: Any) -> Any:
    """Return the plugin's creator for the TensorRT module `trt`, for `trt.get_plugin_registry()`.

    The caller must keep a reference to it as long as TensorRT may use it.
    """
    float_types = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
    quantized = {getattr(trt.DataType, cache.tensorrt): cache.name for cache in QUANTIZED_CACHES.values()}
    field_types = {
        int: (np.int32, trt.PluginFieldType.INT32),
        float: (np.float32, trt.PluginFieldType.FLOAT32),
    }

    class PagedAttentionPlugin(
        Plugin, trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime
    ):
        """One attention layer."""

        identity = (NAME, VERSION, NAMESPACE)
        outputs = _OUTPUTS

        # Build.

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[_QUERY], input_types[_KEY_CACHE], input_types[_VALUE_CACHE]]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr: Any
        ) -> list[Any]:
            del shape_inputs
            value_size = inputs[_VALUE_CACHE][3]
            heads = expr.constant(self.attributes.num_heads)
            features = expr.operation(trt.DimensionOperation.PROD, heads, value_size)
            output = trt.DimsExprs([inputs[_QUERY][0], features])
            return [output, trt.DimsExprs(inputs[_KEY_CACHE]), trt.DimsExprs(inputs[_VALUE_CACHE])]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            tensor = in_out[pos].desc
            if num_inputs != _INPUTS or tensor.format != trt.TensorFormat.LINEAR:
                return False
            if pos in _STEP_INPUTS:
                return tensor.type == trt.DataType.INT32
            if pos in _CACHES and tensor.type != in_out[_KEY_CACHE].desc.type:
                return False
            if pos in _CACHES and tensor.type in quantized:
                return True
            return tensor.type in float_types and tensor.type == in_out[_QUERY].desc.type

        def get_aliased_input(self, output: int) -> int:
            return _ALIASES.get(output, -1)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            del outputs
            heads, kv_heads = self.attributes.num_heads, self.attributes.num_kv_heads
            query, key = inputs[_QUERY].desc.dims, inputs[_KEY_CACHE].desc.dims
            if key[1] != kv_heads or query[1] != heads * key[3]:
                raise ValueError(
                    f"query {list(query)} and key cache {list(key)} contradict {self.attributes}"
                )
            a = self.attributes
            if inputs[_KEY_CACHE].desc.type not in quantized and (a.key_scale, a.value_scale) != (1, 1):
                raise ValueError(f"a cache in the model's dtype has no scales: {a}")

        # Runtime.

        def get_fields_to_serialize(self) -> Any:
            stored = trt.PluginFieldCollection([])
            self._stored = []
            for name, value in self.attributes.stored().items():
                dtype, field_type = field_types[type(value)]
                self._stored.append(np.array([value], dtype))
                stored.append(trt.PluginField(name, self._stored[-1], field_type))
            return stored

        def enqueue(
            self, input_desc: Sequence[Any], output_desc: Sequence[Any], inputs: Sequence[int],
            outputs: Sequence[int], workspace: int, stream: int,
        ) -> None:  # fmt: skip
            del output_desc, workspace
            if self._builds:
                return
            with _launcher.borrowed() as launcher:
                self._launch(launcher, input_desc, inputs, outputs, stream)

        def _launch(
            self, launcher: Launcher, described: Sequence[Any], inputs: Sequence[int],
            outputs: Sequence[int], stream: int,
        ) -> None:  # fmt: skip
            for output, cache in _ALIASES.items():
                if outputs[output] != inputs[cache]:
                    raise ValueError(f"TensorRT gave {DOMAIN}.{NAME} a copy of {_INPUT_NAMES[cache]}")
            key, value = described[_KEY_CACHE].dims, described[_VALUE_CACHE].dims
            launcher.launch(
                _attention(self.attributes, key[3], value[3]),
                float_types[described[_QUERY].type],
                self.attributes.scale,
                {**dict(zip(_INPUT_NAMES, inputs, strict=True)), "output": outputs[0]},
                described[_QUERY].dims[0],
                described[_PAST_LENGTHS].dims[0],
                stream,
                quantized.get(described[_KEY_CACHE].type),
                (self.attributes.key_scale, self.attributes.value_scale),
            )

    class PagedAttentionCreator(trt.IPluginCreatorV3One):
        """Makes the plugin, for a node of the ONNX file or for one stored in an engine."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            described = [trt.PluginField(field.name) for field in fields(Attributes)]
            self.field_names = trt.PluginFieldCollection(described)

        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            del name
            attributes = Attributes.read({f.name: np.asarray(f.data).item() for f in given})
            return PagedAttentionPlugin(attributes, phase == trt.TensorRTPhase.BUILD)

    return PagedAttentionCreator()
