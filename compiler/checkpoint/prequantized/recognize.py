"""Recognize the quantization of a module from its tensors, or find their contradictions.

The tensors decide. Their dtypes and the presence of scales give the format, the shape of the scales gives the
group size. The configuration is used only where the tensors are ambiguous (a single scale may be that of the
tensor or of a block). It is then compared with the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.module import Format, QuantizedModule, Role
from llmc.compiler.checkpoint.prequantized.scheme import DeclaredScheme
from llmc.compiler.checkpoint.prequantized.shapes import lay_out
from llmc.compiler.checkpoint.safetensors import TensorRef

_FLOATS = ("F32", "F16", "BF16")
_INDICES = ("I32", "I64")
_SCALE_DTYPES: dict[str, tuple[str, ...]] = {
    "nvfp4": ("F8_E4M3",),
    "mxfp4": ("F8_E8M0",),
    "fp8-block": (*_FLOATS, "F8_E8M0"),
}
_CODES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4")


def is_quantized(tensors: Mapping[Role, TensorRef]) -> bool:
    """Return whether a module has a weight that consists of codes, or a scale of a weight."""
    weight = tensors.get("weight")
    scales = {"weight_scale", "global_scale", "inverse_global_scale"}
    return bool(scales & tensors.keys()) or (weight is not None and weight.dtype in _CODES)


def recognize(
    name: str, tensors: Mapping[Role, TensorRef], scheme: DeclaredScheme | None
) -> tuple[QuantizedModule | None, list[Finding]]:
    """Return the module, or None if its layout is invalid, and the findings about it."""
    weight = tensors.get("weight")
    if weight is None:
        first = next(iter(tensors.values()))
        return None, [Finding("missing", first.name, f"belongs to {name}, which has no weight")]
    if weight.dtype not in _CODES:
        scale = tensors.get("weight_scale") or next(iter(tensors.values()))
        what = f"scales a weight of {weight.dtype}, which is not quantized"
        return None, [Finding("format", scale.name, what)]
    if len(weight.shape) != 2 or 0 in weight.shape:
        return None, [Finding("shape", weight.name, f"is {list(weight.shape)}; llmc reads [out, in] only")]
    missing = _missing_scales(weight, tensors, scheme)
    if missing:
        return None, [
            Finding("missing", weight.name, f"its {scale_name} is missing") for scale_name in missing
        ]
    fmt = _format(tensors, scheme)
    if fmt is None:
        expected = f" ({scheme.format} was expected)" if scheme else ""
        what = f"has an unknown layout: {weight.dtype} {list(weight.shape)} with these scales{expected}"
        return None, [Finding("format", weight.name, what)]
    findings = _dtypes(fmt, tensors)
    if findings:
        return None, findings
    laid_out = lay_out(name, fmt, tensors, scheme)
    if isinstance(laid_out, Finding):
        return None, [laid_out]
    return laid_out, compare(laid_out, scheme) if scheme else []


def compare(module: QuantizedModule, scheme: DeclaredScheme) -> list[Finding]:
    """Return findings about contradictions between a module with a valid layout and the configuration."""
    weight, scale = module.tensors["weight"], module.tensors["weight_scale"]
    if module.format != scheme.format:
        stored_as = f"{weight.dtype} {list(weight.shape)}"
        what = f"is {module.format} ({stored_as}), but the configuration says {scheme.format}"
        return [Finding("format", weight.name, what)]
    if scheme.group_size is not None:
        size = scheme.group_size or module.shape[1]
        groups = math.ceil(module.shape[1] / size)
        stored = scale.shape[1] if len(scale.shape) > 1 else 1
        if stored != groups:
            declared = scheme.group_size or "one for the row"
            what = f"has {stored} scales per row of {module.shape[1]}: groups of {module.block[1]}, "
            what += f"but the configuration says {declared}"
            if module.format == "nvfp4" and module.block[1] == 2 * size:
                what += ", or the weight is FP8 bytes"
            return [Finding("shape", scale.name, what)]
    findings = []
    if scheme.static_input and not {"input_scale", "inverse_input_scale"} & module.tensors.keys():
        which = "input_global_scale" if "inverse_global_scale" in module.tensors else "input_scale"
        findings.append(
            Finding("missing", weight.name, f"its {which} is missing, but the activations' scale is static")
        )
    if not scheme.symmetric and "zero_point" not in module.tensors:
        findings.append(
            Finding("missing", weight.name, "its weight_zero_point is missing, but it is not symmetric")
        )
    if scheme.symmetric and (point := module.tensors.get("zero_point")) is not None:
        findings.append(Finding("format", point.name, "is present, but the configuration says symmetric"))
    return findings


def _missing_scales(
    weight: TensorRef, tensors: Mapping[Role, TensorRef], scheme: DeclaredScheme | None
) -> list[str]:
    packed = weight.name.endswith("weight_packed")
    missing = [] if "weight_scale" in tensors else ["weight_scale"]
    if weight.dtype == "I32" and packed and "shape" not in tensors:
        missing.append("weight_shape")
    scale = tensors.get("weight_scale")
    four_bits = weight.dtype == "U8" and (
        packed or (scale.dtype == "F8_E4M3" if scale else scheme is not None and scheme.format == "nvfp4")
    )
    if four_bits and not {"global_scale", "inverse_global_scale"} & tensors.keys():
        missing.append("weight_global_scale" if packed else "weight_scale_2")
    return missing


def _format(tensors: Mapping[Role, TensorRef], scheme: DeclaredScheme | None) -> Format | None:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    packed = weight.name.endswith("weight_packed")
    if weight.dtype == "U8":
        if {"global_scale", "inverse_global_scale"} & tensors.keys():
            return "nvfp4"
        if weight.name.endswith("_blocks"):
            return "mxfp4"
        return None if packed else "int4-awq"
    if weight.dtype == "I32" and packed:
        if tensors["shape"].dtype not in _INDICES:
            return "int4-packed"  # _dtypes refuses it
        shape = tensors["shape"].read().reshape(-1)
        columns = int(shape[-1]) if shape.size else 0
        by_bits: dict[int, Format] = {4: "int4-packed", 8: "int8-packed"}
        fitting = [fmt for bits, fmt in by_bits.items() if math.ceil(columns * bits / 32) == weight.shape[1]]
        if len(fitting) == 2:  # one word per row
            return scheme.format if scheme and scheme.format in fitting else fitting[0]
        return (
            fitting[0]
            if fitting
            else (scheme.format if scheme and scheme.format in by_bits.values() else None)
        )
    if weight.dtype == "I8":
        return "int8"
    if weight.dtype == "F8_E4M3":
        if scale.name.endswith("_inv") and len(scale.shape) == 2:
            return "fp8-block"
        if math.prod(scale.shape) == 1:
            return "fp8-block" if scheme and scheme.format == "fp8-block" else "fp8"
        if len(scale.shape) == 1 or (len(scale.shape) == 2 and scale.shape == (weight.shape[0], 1)):
            return "fp8-channel"
        return "fp8-block"
    return None


def _dtypes(fmt: Format, tensors: Mapping[Role, TensorRef]) -> list[Finding]:
    """Return findings about tensors with a dtype that the format does not have, or that must be scalars."""
    allowed = {
        "weight_scale": _SCALE_DTYPES.get(fmt, _FLOATS),
        "zero_point": ("I32",),
        "group_index": _INDICES,
        "shape": _INDICES,
    }
    findings = []
    for role, ref in tensors.items():
        if role not in ("weight", "bias") and ref.dtype not in (known := allowed.get(role, _FLOATS)):
            what = f"is {ref.dtype}; {fmt} has {' or '.join(known)}"
            findings.append(Finding("dtype", ref.name, what))
        scalars = ("global_scale", "inverse_global_scale", "input_scale", "inverse_input_scale")
        if role in scalars and math.prod(ref.shape) != 1:
            findings.append(Finding("shape", ref.name, f"is {list(ref.shape)}, not one number"))
    return findings
