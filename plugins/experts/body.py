"""`llmc.Experts` as a function of standard ONNX operators, which any ONNX runtime executes in fp32.

It computes all experts for all tokens and gives those that were not chosen the weight 0. This takes E / K
times the arithmetic of an engine, which computes only the chosen ones.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.experts.spec import ABI_VERSION, DOMAIN, REQUIRED


# mypy: disable-error-code="no-untyped-def,name-defined"
@onnxscript.script(onnxscript.values.Opset(DOMAIN, ABI_VERSION), default_opset=op)
def Experts(
    x,
    ids,
    weights,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    experts: int,
    activation: int,
    limit: float,
    alpha: float,
):
    last, second = op.Constant(value_ints=[-1]), op.Constant(value_ints=[1])
    chosen_function = op.Constant(value_int=activation)
    count = op.Unsqueeze(op.Constant(value_int=experts), op.Constant(value_ints=[0]))
    width = op.Shape(x, start=1, end=2)
    all_up = op.Transpose(op.Reshape(gate_up, op.Concat(count, last, width, axis=0)), perm=[0, 2, 1])
    all_down = op.Transpose(op.Reshape(down, op.Concat(count, width, last, axis=0)), perm=[0, 2, 1])
    product = op.MatMul(op.Unsqueeze(x, op.Constant(value_ints=[0])), all_up)
    both = op.Add(product, op.Unsqueeze(gate_up_bias, second))  # [E, T, 2*I]

    gate, up = op.Split(both, num_outputs=2, axis=2)
    is_silu = op.Equal(chosen_function, op.Constant(value_int=0))
    of_halves = op.Mul(op.Where(is_silu, op.Mul(gate, op.Sigmoid(gate)), op.Gelu(gate)), up)  # [E, T, I]

    most = op.Constant(value_float=limit)
    axis, step = op.Constant(value_ints=[2]), op.Constant(value_ints=[2])
    end = op.Constant(value_ints=[9223372036854775807])
    even = op.Slice(both, op.Constant(value_ints=[0]), end, axis, step)
    odd = op.Slice(both, second, end, axis, step)
    low_gate = op.Min(even, most)
    near_up = op.Min(op.Max(odd, op.Neg(most)), most)
    swish = op.Mul(low_gate, op.Sigmoid(op.Mul(op.Constant(value_float=alpha), low_gate)))
    clamped = op.Mul(op.Add(near_up, op.Constant(value_float=1.0)), swish)

    is_clamped = op.Equal(chosen_function, op.Constant(value_int=2))
    hidden = op.Where(is_clamped, clamped, of_halves)
    chosen = op.OneHot(ids, count, op.Constant(value_floats=[0.0, 1.0]))  # [T, K, E]
    shares = op.ReduceSum(op.Mul(chosen, op.Unsqueeze(weights, last)), second, keepdims=0)  # [T, E]
    shares = op.Unsqueeze(op.Transpose(shares, perm=[1, 0]), last)  # [E, T, 1]
    outputs = op.Add(op.MatMul(hidden, all_down), op.Unsqueeze(down_bias, second))
    return op.ReduceSum(op.Mul(outputs, shares), op.Constant(value_ints=[0]), keepdims=0)


def function(biases: bool = False) -> ir.Function:
    """Return the function body as an `onnx_ir.Function`, to be stored in a model that uses the operator.

    biases: whether the nodes have the optional inputs
    """
    body: Any = Experts
    made = ir.serde.deserialize_function(body.to_function_proto())
    if not biases:
        for bias in list(made.inputs)[REQUIRED:]:
            ((unsqueeze, _),) = bias.uses()
            ((add, _),) = unsqueeze.outputs[0].uses()
            product = add.inputs[0]
            assert product is not None
            ir.convenience.replace_all_uses_with(add.outputs[0], product)
            made.remove([add, unsqueeze], safe=True)
        del made.inputs[REQUIRED:]
    return made
