"""`llmc.AllReduce` and `llmc.AllGather` as TensorRT plugins in Python.

They describe shapes to the builder, and hold no communicator. The caller that runs an engine provides the
collectives for the call (`use_collectives`). TensorRT's own DistCollective loses the group of a collective
(TensorRT-RTX 1.7.1).

    llmc.AllReduce   x [N, W]   ->   y [N, W]
    llmc.AllGather   x [N, W]   ->   y [ranks, N, W], the layout of NCCL. `tensorrt_boundary.to_tensorrt`
                                     transposes it to the columns of spec.py.

A second input, which is not read, is the result of the collective before, where nothing else keeps TensorRT
from running this one first. All ranks must run them in the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from llmc.plugins.collectives.spec import ABI_VERSION, ALL_GATHER, ALL_REDUCE, DOMAIN
from llmc.plugins.lent import Lent
from llmc.plugins.tensorrt_plugin import Plugin, add_creator

NAMESPACE = DOMAIN
VERSION = str(ABI_VERSION)
NAMES = (ALL_REDUCE, ALL_GATHER)


@dataclass(frozen=True)
class Attributes:
    """The node's attributes, as `spec.py` defines them."""

    ranks: int
    sequence: int

    @classmethod
    def read(cls, name: str, given: Mapping[str, int]) -> Attributes:
        """Read a node's or an engine's fields. Raises ValueError if they are not those of the operator."""
        known = {field.name for field in fields(cls)}
        if given.keys() != known:
            raise ValueError(f"{DOMAIN}.{name} has the fields {', '.join(sorted(given))}")
        if given["ranks"] < 1 or given["sequence"] < 0:
            raise ValueError(f"{DOMAIN}.{name} has the fields {dict(given)}")
        return cls(**given)


class Collectives(Protocol):
    """The collectives that a plugin needs to run, such as `nccl.NcclCollectives`.

    operation: one of NAMES
    dtype: "fp32", "fp16" or "bf16"
    source, target: the addresses of the input and the output
    count: the number of elements of the input
    """

    def run(
        self, operation: str, attributes: Attributes, dtype: str, source: int, target: int, count: int,
        stream: int,
    ) -> None: ...  # fmt: skip


_collectives: Lent[Collectives] = Lent(f"{DOMAIN} collectives have no communicator in this process")
#: Let engines that this thread runs in the `with` block call these collectives.
use_collectives = _collectives.lend


@functools.cache
def register(trt: Any) -> tuple[Any, ...]:
    """Register the plugins with the TensorRT module `trt`, once in a process. Return their creators.

    Raises RuntimeError if another plugin has one of the names.
    """
    creators = make_plugins(trt)
    for creator in creators:
        add_creator(trt, creator)
    return creators


def make_plugins(trt: Any) -> tuple[Any, ...]:
    """Return the creator of each plugin for the TensorRT module `trt`, for `trt.get_plugin_registry()`.

    The caller must keep a reference to them as long as TensorRT may use them.
    """
    return tuple(_make_plugin(trt, name) for name in NAMES)


def _make_plugin(trt: Any, name: str) -> Any:
    types = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}

    class CollectivePlugin(
        Plugin, trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        """One collective."""

        identity = (name, VERSION, NAMESPACE)
        outputs = 1

        # Build.

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr: Any
        ) -> list[Any]:
            del shape_inputs
            x = inputs[0]
            if name == ALL_REDUCE:
                return [trt.DimsExprs(x)]
            return [trt.DimsExprs([expr.constant(self.attributes.ranks), x[0], x[1]])]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            tensor = in_out[pos].desc
            if num_inputs > 2 or tensor.format != trt.TensorFormat.LINEAR:
                return False
            free = num_inputs == 2 and pos == 1  # the result before may have another type
            return tensor.type in types and (free or tensor.type == in_out[0].desc.type)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            del inputs, outputs

        # Runtime.

        def get_fields_to_serialize(self) -> Any:
            values = {field.name: getattr(self.attributes, field.name) for field in fields(Attributes)}
            self._stored = [np.array([value], np.int32) for value in values.values()]
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(field, stored, trt.PluginFieldType.INT32)
                    for field, stored in zip(values, self._stored, strict=True)
                ]
            )

        def enqueue(
            self, input_desc: Sequence[Any], output_desc: Sequence[Any], inputs: Sequence[int],
            outputs: Sequence[int], workspace: int, stream: int,
        ) -> None:  # fmt: skip
            del output_desc, workspace
            if self._builds:
                return
            with _collectives.borrowed() as collectives:
                collectives.run(
                    name,
                    self.attributes,
                    types[input_desc[0].type],
                    inputs[0],
                    outputs[0],
                    math.prod(input_desc[0].dims),
                    stream,
                )

    class CollectiveCreator(trt.IPluginCreatorV3One):
        """Makes the plugin, for a node of the ONNX file or for one stored in an engine."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, VERSION, NAMESPACE
            described = [trt.PluginField(field.name) for field in fields(Attributes)]
            self.field_names = trt.PluginFieldCollection(described)

        def create_plugin(self, given_name: str, given: Any, phase: Any) -> Any:
            del given_name
            values = {field.name: int(np.asarray(field.data).item()) for field in given}
            return CollectivePlugin(Attributes.read(name, values), phase == trt.TensorRTPhase.BUILD)

    return CollectiveCreator()
