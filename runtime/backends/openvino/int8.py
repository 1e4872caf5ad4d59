"""Static INT8 activation quantization: the check that this CPU computes int8 MatMuls without overflow.

OpenVINO reads QuantizeLinear to int8 as FakeQuantize. Its low-precision transformations turn that and int8
weights into an int8 MatMul, which is exact on CPUs with VNNI. On others (AVX2, the first AVX-512) oneDNN adds
two 8-bit products in 16 bits, which overflow. With oneDNN limited to AVX2, the error was a quarter of the
largest output (ONEDNN_MAX_CPU_ISA=AVX2, OpenVINO 2026.4, 2026-11-26). On such CPUs the transformations are
off: activations are quantized to the same values and multiplied in fp32 by widened weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.op import Parameter

IN_FP32 = {"LP_TRANSFORMS_MODE": False}  # the property of `compile_model` that turns them off
_WIDTH = 64


def quantizes_activations(model: ov.Model) -> bool:
    """Return whether any layer of `model` quantizes its input with a static scale."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def is_exact(core: ov.Core, config: dict[str, Any]) -> bool:
    """Return whether this CPU adds the largest int8 products (64 times 127 x 127) without overflow."""
    x = Parameter(ov.Type.f32, ov.PartialShape([-1, _WIDTH]))
    low, high = (ops.constant(np.float32(limit)) for limit in (-128, 127))
    rounded = ops.fake_quantize(x, low, high, low, high, 256)
    codes = ops.constant(np.full((_WIDTH, _WIDTH), 127, np.int8))
    weight = ops.multiply(ops.convert(codes, "f32"), ops.constant(np.ones((_WIDTH, 1), np.float32)))
    product = ops.matmul(rounded, weight, transpose_a=False, transpose_b=True)
    model = ov.Model([ops.result(product)], [x], "int8_self_test")
    output = core.compile_model(model, "CPU", config)(np.full((8, _WIDTH), 127, np.float32))[0]
    return bool((output == 127 * 127 * _WIDTH).all())
