"""Plan the quantization of the linear layers of a canonical graph."""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.quantize.prequantized_plan import (
    PrequantizedPlan,
    PrequantizedWeights,
    make_prequantized_plan,
)
from llmc.passes.quantize.formats import get_format
from llmc.passes.quantize.plan import QuantPlan, make_plan
from llmc.passes.quantize.survey import survey
from llmc.runtime.errors import RequestError, UnsupportedError


def plan_weights(
    model: ir.Model,
    fmt: str,
    exclude: tuple[str, ...],
    recipe_exclude: tuple[str, ...],
    stored_bits: int,
    scales: str | None = None,
    head: str | None = None,
) -> QuantPlan:
    """Return the plan for the linear layers of a canonical graph, which is not changed.

    fmt: the name of the format
    exclude, recipe_exclude: modules that are not quantized, as shell patterns
    stored_bits: bits per value of the other weights
    scales: as in `make_plan`
    head: the format of lm_head; None: not quantized

    Raises RequestError as `make_plan` does, and for a format that quantizes the inputs of experts.
    """
    linears = survey(model, with_tied=head is not None)
    if linears.experts and get_format(fmt).activations:
        raise RequestError(
            f"{fmt} quantizes the inputs of layers, which llmc cannot do for experts ({linears.experts[0]})",
            "choose a weight-only format: int8, int4, int4-block128, mxfp4 or nvfp4-weight-only",
            "quant",
        )
    return make_plan(
        linears.shapes, fmt, exclude, recipe_exclude, groups=linears.groups, scales=scales,
        stored_bits=stored_bits, other_params=linears.other_params, head=head, tied=linears.tied,
    )  # fmt: skip


def plan_prequantized(model: ir.Model, stored: PrequantizedWeights, stored_bits: int) -> PrequantizedPlan:
    """Return the plan for a pre-quantized checkpoint and its canonical graph, which is not changed.

    stored_bits: bits per value of the other weights

    Raises UnsupportedError as `make_prequantized_plan` does, and for experts that are not quantized in it.
    """
    linears = survey(model)
    if apart := [name for name in linears.experts if name not in stored.modules]:
        raise UnsupportedError(
            f"the checkpoint is pre-quantized and has experts in another form ({apart[0]})",
            "llmc quantizes the experts of the unquantized checkpoint: --quant int8 or --quant int4",
        )
    return make_prequantized_plan(
        stored, linears.shapes, linears.groups, stored_bits=stored_bits, other_params=linears.other_params
    )
