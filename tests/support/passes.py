"""Lists of passes on small graphs. The runner's checks are left out: the graphs lack inputs of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from llmc.passes import edit, pipeline
from llmc.passes.contract import Pass
from llmc.passes.parameter import of_tensor, set_parameter
from llmc.passes.quantize.plan import QuantPlan
from llmc.passes.quantize.quantize_kv_cache import QuantizeKVCache, fill_kv_scales
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES


def apply(model: ir.Model, passes: Sequence[Pass]) -> list[int]:
    """Run `passes` in order, in place. Return the number of matches of each."""
    return [one(model).count for one in passes]


def mark_parameters(model: ir.Model) -> ir.Model:
    """Make the initializers without data parameters of the checkpoint, by their names, as a trace does."""
    for value in model.graph.initializers.values():
        if value.const_value is None:
            name, shape = str(value.name), tuple(edit.dims(value))
            record = of_tensor(name, shape)
            if "." not in name:  # the name of a module, in texts of graphs
                record = replace(record, modules=(name,), array="weight")
            set_parameter(value, record)
    return model


def quantize(model: ir.Model, plan: QuantPlan) -> None:
    apply(model, pipeline.quantize(plan, False))


def set_kv_scales(model: ir.Model, largest: Mapping[int, tuple[float, float]]) -> None:
    """Give the graph FP8 caches with the scales of these largest magnitudes of (keys, values) by layer."""
    QuantizeKVCache(QUANTIZED_CACHES["fp8"])(model)
    fill_kv_scales(model, largest)


def lower_for_tensorrt(model: ir.Model, dtype: str) -> None:
    apply(model, pipeline.legalize_tensorrt(dtype))


def oracle_graph(model: ir.Model, dtype: str, *, round_cache: bool = True) -> ir.Model:
    """Return a copy of TensorRT's graph that ONNX Runtime runs."""
    stand_in = model.clone()
    apply(stand_in, pipeline.oracle(dtype, round_cache))
    return stand_in
