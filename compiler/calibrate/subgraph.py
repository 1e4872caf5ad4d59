"""Run a part of the canonical graph in ONNX Runtime, with weights read from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.passes import edit
from llmc.passes.extract import extract
from llmc.passes.legalize.finalize import serialize
from llmc.passes.parameter import Parameter, parameter
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.cpus import default_threads
from llmc.runtime.dtypes import FLOATS
from llmc.runtime.errors import BuildError


class Piece:
    """A subgraph in an ONNX Runtime session: computes `outputs` from a step and earlier pieces' values.

    model: the canonical graph, which is not changed
    nodes: the nodes that `outputs` need and that no earlier piece ran, in the graph's order
    outputs: the values to return; those that `nodes` do not compute are ignored
    tensors: the checkpoint's tensors, by name

    Parameters are read on construction and live as long as the piece. An embedding is the exception: each
    step reads only the rows of its tokens.
    Raises BuildError if the checkpoint lacks a parameter or does not have it in floating point.
    """

    def __init__(
        self,
        model: ir.Model,
        nodes: Iterable[ir.Node],
        outputs: Iterable[ir.Value],
        tensors: Mapping[str, TensorRef],
    ) -> None:
        nodes = list(nodes)
        self._lookups = {node.outputs[0]: node for node in nodes if _is_lookup(node)}
        computed = [node for node in nodes if node.outputs[0] not in self._lookups]
        computed_values = {value for node in computed for value in node.outputs}
        self._tensors = tensors
        self._inputs = [
            value
            for value in dict.fromkeys(
                value for node in computed for value in node.inputs if value is not None
            )
            if value not in computed_values and (value.const_value is None or parameter(value) is not None)
        ]
        self._weights = {
            value: read_float32(record, edit.dims(value), tensors)
            for value in self._inputs
            if (record := parameter(value)) is not None
        }
        self._outputs = [value for value in dict.fromkeys(outputs) if value in computed_values]
        self._session = _session(model, self._inputs, self._outputs) if self._outputs else None

    def __call__(self, step: Batch, crossed: Mapping[ir.Value, np.ndarray]) -> dict[ir.Value, np.ndarray]:
        """Run one step. crossed: the values of earlier pieces.

        Returns `crossed`, the embedding rows and all outputs, float32.
        """
        values = dict(crossed) | {value: self._look_up(node, step) for value, node in self._lookups.items()}
        if self._session is None:
            return values
        feeds = {}
        for value, port in zip(self._inputs, self._session.get_inputs(), strict=True):
            if value in self._weights:
                feeds[port.name] = self._weights[value]
            elif value in values:
                feeds[port.name] = values[value]
            elif value.name in STEP_INPUTS:
                feeds[port.name] = getattr(step, str(value.name))
            else:
                blocks = len(step.block_indices)
                feeds[port.name] = np.zeros((blocks, *edit.dims(value)[1:]), np.float32)
        arrays = self._session.run(None, feeds)
        return values | dict(zip(self._outputs, arrays, strict=True))

    def _look_up(self, node: ir.Node, step: Batch) -> np.ndarray:
        ids, places = np.unique(getattr(step, str(edit.operand(node, 1).name)), return_inverse=True)
        record = parameter(edit.operand(node, 0))
        assert record is not None
        (source,) = record.sources
        ref = _tensor(source.tensor, self._tensors)
        return np.stack([ref.read(slice(i, i + 1))[0].astype(np.float32) for i in ids.tolist()])[places]


def read_float32(record: Parameter, shape: Sequence[int], tensors: Mapping[str, TensorRef]) -> np.ndarray:
    """Read a parameter as float32 of `shape`. The rows of fused layers are concatenated.

    Raises BuildError if the checkpoint lacks a tensor or does not have it in floating point.
    """
    array = np.empty(shape, np.float32)
    first = 0
    for source in record.sources:
        ref = _tensor(source.tensor, tensors)
        if not ref.shape:
            array[...] = ref.read()
            continue
        for block in ref.iter_chunks():
            chunk = block.reshape(-1, *shape[1:])  # the rows of a stack of experts are those of all experts
            array[first : first + len(chunk)] = chunk
            first += len(chunk)
    return array


def _tensor(name: str, tensors: Mapping[str, TensorRef]) -> TensorRef:
    ref = tensors.get(name)
    if ref is None:
        raise BuildError(f"the graph needs {name}, which the checkpoint lacks", "is the download complete?")
    if ref.dtype not in FLOATS:
        raise BuildError(
            f"tensor {name} is {ref.dtype}; calibration runs the model in floating point",
            "calibrate with the original, unquantized weights",
        )
    return ref


def _is_lookup(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or (axis is not None and axis.as_int() != 0):
        return False
    table, ids = edit.operand(node, 0), edit.operand(node, 1)
    return parameter(table) is not None and ids.is_graph_input() and ids.name in STEP_INPUTS


def _session(
    model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> ort.InferenceSession:
    """Return a session of the nodes between `inputs` and `outputs`, which keep their order in the session."""
    part = extract(model, inputs, outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = default_threads() or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions are short-lived
    return ort.InferenceSession(serialize(part), options, providers=["CPUExecutionProvider"])
