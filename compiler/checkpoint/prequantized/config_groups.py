"""Read the quantization schemes in `config_groups`, which compressed-tensors and ModelOpt write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmc.compiler.checkpoint.prequantized.module import Format
from llmc.compiler.checkpoint.prequantized.scheme import DeclaredScheme
from llmc.runtime.errors import UnsupportedError

Groups = tuple[tuple[tuple[str, ...], DeclaredScheme], ...]


def read_groups(config: Mapping[str, Any], int4: Format) -> Groups:
    """Return (targets, scheme) for each entry of `config_groups`.

    config: the object that has `config_groups`
    int4: the format of 4-bit integers, "int4-packed" or "int4-awq"

    Raises UnsupportedError for a format that llmc does not read.
    """
    groups = config.get("config_groups")
    schemes: list[tuple[tuple[str, ...], DeclaredScheme]] = []
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue  # activations or attention only
        inputs = group.get("input_activations")
        static = isinstance(inputs, dict) and inputs.get("dynamic") in (False, "local", None)
        layout = group.get("format") or config.get("format")
        scheme = replace(_group_scheme(name, weights, static, layout, int4), inputs=_inputs(inputs))
        schemes.append((names(group.get("targets")) or ("Linear",), scheme))
    return tuple(schemes)


def _group_scheme(
    name: str, weights: Mapping[str, Any], static: bool, layout: Any, int4: Format
) -> DeclaredScheme:
    bits, element, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size else "tensor")
    group = 0 if strategy == "channel" else size if isinstance(size, int) and size > 0 else None
    symmetric = weights.get("symmetric", True) is not False
    if element == "float" and bits == 8 and strategy in ("tensor", "channel"):
        return DeclaredScheme("fp8" if strategy == "tensor" else "fp8-channel", static_input=static)
    if element == "float" and bits == 8 and strategy == "block":
        block = weights.get("block_structure")
        sizes = block.split("x") if isinstance(block, str) else block  # "128x128" in old files
        numbers = [int(part) for part in sizes or () if str(part).isdecimal() and int(part)]
        shape = (numbers[0], numbers[1]) if len(numbers) == 2 else (128, 128)
        return DeclaredScheme("fp8-block", block=shape, static_input=static)
    if element == "float" and bits == 4 and layout in (None, "nvfp4-pack-quantized", "mixed-precision"):
        return DeclaredScheme("nvfp4", group or 16, static_input=static)
    if element == "int" and bits == 4 and (layout == "pack-quantized" or int4 == "int4-awq"):
        return DeclaredScheme(int4, group, symmetric=symmetric)
    if element == "int" and bits == 8 and layout == "pack-quantized":
        return DeclaredScheme("int8-packed", group, symmetric=symmetric)
    if element == "int" and bits == 8 and strategy in ("tensor", "channel") and symmetric:
        return DeclaredScheme("int8")
    raise UnsupportedError(
        f"the weights of {name} are {bits}-bit {element}, {strategy}, {layout}, which llmc does not read",
        hint="known: float-quantized FP8, nvfp4-pack-quantized, pack-quantized with 4 or 8 bits, "
        "int-quantized with 8 bits",
    )


def _inputs(activations: Any) -> str:
    """Return the activation quantization: {"num_bits": 8, "type": "float"} -> "fp8"; "" for none."""
    if not isinstance(activations, dict) or not activations.get("num_bits"):
        return ""
    return f"{'fp' if activations.get('type') == 'float' else 'int'}{activations['num_bits']}"


def describe_groups(groups: Groups) -> str:
    """Return the formats of the groups: "fp8 and nvfp4"."""
    return " and ".join(dict.fromkeys(scheme.format for _, scheme in groups)) or "without a format"


def first_group_size(config: Mapping[str, Any]) -> Any:
    """Return the first `group_size` of weights in `config_groups`, or None."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("group_size"):
            return weights["group_size"]
    return None


def kv_format(scheme: Any) -> str:
    """Return the format of the KV cache: "FP8" or {"num_bits": 8, "type": "float"} -> "FP8"; "" for none."""
    if isinstance(scheme, dict):
        affine = "_AFFINE" if scheme.get("symmetric") is False else ""
        return f"{'FP' if scheme.get('type') == 'float' else 'INT'}{scheme.get('num_bits', '?')}{affine}"
    return str(scheme) if scheme else ""


def names(value: Any) -> tuple[str, ...] | None:
    """Return a list of the configuration as strings; None for anything else."""
    return tuple(str(name) for name in value) if isinstance(value, list) else None
