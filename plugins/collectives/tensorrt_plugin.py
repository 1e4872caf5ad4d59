"""`llmc.AllReduce`, `llmc.AllGather`, `llmc.Send` and `llmc.Recv` as TensorRT plugins in Python.

They describe shapes to the builder, and hold no communicator. The caller that runs an engine provides the
collectives for the call (`use_collectives`). TensorRT's own DistCollective loses the group of a collective
(TensorRT-RTX 1.7.1).

    llmc.AllReduce   x [N, W]   ->   y [N, W]
    llmc.AllGather   x [N, W]   ->   y [ranks, N, W], the layout of NCCL. `tensorrt_boundary.to_tensorrt`
                                     transposes it to the columns of spec.py.
    llmc.Send        x [N, ...]   ->  y [1], which nobody writes or reads: it keeps the node
    llmc.Recv        ids [N]   ->   y [N, width], with the dtype of that number in ONNX

A second input, which is not read, is the result of the operator before, where nothing else keeps TensorRT
from running this one first. All ranks must run them in the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmc.plugins.collectives.spec import ABI_VERSION, ALL_GATHER, ALL_REDUCE, DOMAIN, RECV, SEND
from llmc.plugins.lent import Lent
from llmc.plugins.tensorrt_plugin import Plugin, add_creator

NAMESPACE = DOMAIN
VERSION = str(ABI_VERSION)
#: Operator -> its fields in an engine.
_FIELDS = {
    ALL_REDUCE: ("ranks", "sequence"),
    ALL_GATHER: ("ranks", "sequence"),
    SEND: ("peer", "sequence"),
    RECV: ("peer", "sequence", "width", "dtype"),
}
NAMES = tuple(_FIELDS)
_ONNX = {1: "fp32", 10: "fp16", 16: "bf16"}  # the number of a type in ONNX -> its name
_LEAST = {"ranks": 1, "width": 1}  # field -> its smallest value, if that is not 0


@dataclass(frozen=True)
class Attributes:
    """The node's attributes, as `spec.py` defines them. An operator has some of them."""

    ranks: int = 0
    sequence: int = 0
    peer: int = 0
    #: The columns that are received.
    width: int = 0
    #: The number of their dtype in ONNX.
    dtype: int = 0

    @classmethod
    def read(cls, name: str, given: Mapping[str, int]) -> Attributes:
        """Read a node's or an engine's fields. Raises ValueError if they are not those of the operator."""
        if given.keys() != set(_FIELDS[name]):
            raise ValueError(f"{DOMAIN}.{name} has the fields {', '.join(sorted(given))}")
        if any(value < _LEAST.get(field, 0) for field, value in given.items()) or (
            name == RECV and given["dtype"] not in _ONNX
        ):
            raise ValueError(f"{DOMAIN}.{name} has the fields {dict(given)}")
        return cls(**given)


class Collectives(Protocol):
    """The collectives and transfers that a plugin needs to run, such as `nccl.NcclCollectives`.

    operation: one of NAMES
    dtype: "fp32", "fp16" or "bf16"
    source, target: the addresses of the input and the output. A Send has no output, a Recv no input.
    count: the number of elements of the input, or of what a Recv receives
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
    known = {value: key for key, value in types.items()}

    class CollectivePlugin(
        Plugin, trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        """One collective or transfer."""

        identity = (name, VERSION, NAMESPACE)
        outputs = 1

        # Build.

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [known[_ONNX[self.attributes.dtype]] if name == RECV else input_types[0]]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr: Any
        ) -> list[Any]:
            del shape_inputs
            x = inputs[0]
            if name == ALL_REDUCE:
                return [trt.DimsExprs(x)]
            if name == SEND:
                return [trt.DimsExprs([expr.constant(1)])]
            if name == RECV:
                return [trt.DimsExprs([x[0], expr.constant(self.attributes.width)])]
            return [trt.DimsExprs([expr.constant(self.attributes.ranks), x[0], x[1]])]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            tensor = in_out[pos].desc
            if num_inputs > 2 or tensor.format != trt.TensorFormat.LINEAR:
                return False
            free = num_inputs == 2 and pos == 1  # the result before may have another type
            if name == RECV and not free:
                return bool(
                    tensor.type == (known[_ONNX[self.attributes.dtype]] if pos else trt.DataType.INT32)
                )
            return tensor.type in types and (free or tensor.type == in_out[0].desc.type)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            del inputs, outputs

        # Runtime.

        def get_fields_to_serialize(self) -> Any:
            values = {field: getattr(self.attributes, field) for field in _FIELDS[name]}
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
            x, attributes = input_desc[0], self.attributes
            count = math.prod(x.dims) * (attributes.width if name == RECV else 1)
            dtype = _ONNX[attributes.dtype] if name == RECV else types[x.type]
            source = 0 if name == RECV else inputs[0]
            target = 0 if name == SEND else outputs[0]
            with _collectives.borrowed() as collectives:
                collectives.run(name, attributes, dtype, source, target, count, stream)

    class CollectiveCreator(trt.IPluginCreatorV3One):
        """Makes the plugin, for a node of the ONNX file or for one stored in an engine."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, VERSION, NAMESPACE
            described = [trt.PluginField(field) for field in _FIELDS[name]]
            self.field_names = trt.PluginFieldCollection(described)

        def create_plugin(self, given_name: str, given: Any, phase: Any) -> Any:
            del given_name
            values = {field.name: int(np.asarray(field.data).item()) for field in given}
            return CollectivePlugin(Attributes.read(name, values), phase == trt.TensorRTPhase.BUILD)

    return CollectiveCreator()
