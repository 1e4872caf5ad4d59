"""Layers that round their inputs to int8 with a static scale: whether this CPU multiplies them right in int8.

OpenVINO reads QuantizeLinear of int8 as FakeQuantize, and its low-precision transformations make an int8
product of that and of int8 weights, exact on CPUs with VNNI. On others (AVX2, the first AVX-512) oneDNN adds
two products of 8 bits in 16, which overflow: measured with oneDNN held to AVX2 (ONEDNN_MAX_CPU_ISA=AVX2,
OpenVINO 2026.4, 2026-11-26), a quarter of the largest output was error. There the transformations are
switched off: inputs are rounded to the same numbers, and multiplied in fp32 with weights that are widened.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.op import Parameter

IN_FP32 = {"LP_TRANSFORMS_MODE": False}  # a setting of `compile_model`
_WIDTH = 64


def rounds_inputs(model: ov.Model) -> bool:
    """Return whether any layer of `model` quantizes its input with a static scale."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def is_exact(core: ov.Core, config: dict[str, Any]) -> bool:
    """Return whether this CPU adds the largest int8 products, 64 times 127 x 127, without overflow."""
    x = Parameter(ov.Type.f32, ov.PartialShape([-1, _WIDTH]))
    low, high = (ops.constant(np.float32(limit)) for limit in (-128, 127))
    rounded = ops.fake_quantize(x, low, high, low, high, 256)
    codes = ops.constant(np.full((_WIDTH, _WIDTH), 127, np.int8))
    weight = ops.multiply(ops.convert(codes, "f32"), ops.constant(np.ones((_WIDTH, 1), np.float32)))
    product = ops.matmul(rounded, weight, transpose_a=False, transpose_b=True)
    model = ov.Model([ops.result(product)], [x], "int8_self_test")
    output = core.compile_model(model, "CPU", config)(np.full((8, _WIDTH), 127, np.float32))[0]
    return bool((output == 127 * 127 * _WIDTH).all())
