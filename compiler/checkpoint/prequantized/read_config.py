"""Read the quantization scheme that the configuration files of a checkpoint declare.

    config.json           `quantization_config`: ModelOpt, compressed-tensors, `fp8` (DeepSeek), or `mxfp4`
                          (gpt-oss)
    hf_quant_config.json  ModelOpt

The tensors decide the format of a module. They are compared with these schemes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmc.compiler.checkpoint.checkpoint import CONFIG, Checkpoint
from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.config_groups import (
    Groups,
    describe_groups,
    first_group_size,
    kv_format,
    names,
    read_groups,
)
from llmc.compiler.checkpoint.prequantized.scheme import DeclaredScheme, DeclaredSchemes
from llmc.compiler.checkpoint.safetensors import refuse_lfs_pointer
from llmc.runtime.errors import CheckpointError, UnsupportedError

MODELOPT_FILE = "hf_quant_config.json"
METHODS = {
    "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
    "fp8": "block FP8 (DeepSeek)",
    "mxfp4": "MXFP4 (gpt-oss)",
}
_KEY = "quantization_config"


def read_schemes(checkpoint: Checkpoint) -> DeclaredSchemes | None:
    """Return the schemes that a checkpoint's files declare; None if they do not declare quantization.

    Raises UnsupportedError for a method or format that llmc does not read, and CheckpointError for
    damaged files.
    """
    declared = checkpoint.config.get(_KEY) or None  # {} declares nothing
    text = checkpoint.config.get("text_config")
    if declared is None and isinstance(text, dict):
        declared = text.get(_KEY) or None
    file = checkpoint.path / MODELOPT_FILE
    modelopt = _read_json(checkpoint) if file.is_file() else None
    if declared is None and modelopt is None:
        return None
    if declared is not None and not isinstance(declared, dict):
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: {_KEY} is not an object", hint="the file is damaged"
        )
    if declared is None:
        return _modelopt(modelopt or {})
    method = declared.get("quant_method") or ("modelopt" if modelopt is not None else None)
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedError(
            f"{checkpoint.path} is quantized with {method!r}, which llmc does not read",
            hint=f"known: {', '.join(METHODS)}; or start from the checkpoint that was quantized",
        )
    if method == "compressed-tensors":
        return _compressed_tensors(declared)
    if method == "fp8":
        return _fp8(declared)
    if method == "mxfp4":
        return _mxfp4(declared)
    schemes = _modelopt(declared)
    return schemes if modelopt is None else _compare(schemes, _modelopt(modelopt))


def _compare(schemes: DeclaredSchemes, beside: DeclaredSchemes) -> DeclaredSchemes:
    """Compare the schemes of config.json with those of hf_quant_config.json, `beside`.

    Returns the former, with the differences as findings and with missing fields taken from the latter.
    """
    findings = []
    if schemes.groups != beside.groups and schemes.label != beside.label:
        what = f"declares {beside.label}, but {CONFIG} declares {schemes.label}"
        findings.append(Finding("config", MODELOPT_FILE, what))
    if schemes.exclude is None:
        schemes = replace(schemes, exclude=beside.exclude)
    elif beside.exclude is not None and set(schemes.exclude) != set(beside.exclude):
        differing = sorted(set(schemes.exclude) ^ set(beside.exclude))
        what = f"excludes other modules than {CONFIG} does, such as {differing[0]!r}"
        findings.append(Finding("config", MODELOPT_FILE, what, warning=True))
    return replace(
        schemes,
        findings=(*schemes.findings, *findings),
        kv_cache=schemes.kv_cache or beside.kv_cache,
        producer=schemes.producer or beside.producer,
    )


# ModelOpt's `quant_algo` -> whether the scale of the activations is stored; None if it may be.
_STATIC = {"FP8": True, "NVFP4": True, "NVFP4_AWQ": True, "W4A8_NVFP4_FP8": True, "W8A8_SQ_PER_CHANNEL": None}

# ModelOpt's `quant_algo` -> activation quantization.
_INPUTS = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB": "fp8",
    "NVFP4": "fp4",
    "NVFP4_AWQ": "fp4",
    "W4A8_NVFP4_FP8": "fp8",
    "W8A8_SQ_PER_CHANNEL": "int8",
}


def _algorithm(name: Any, group: Any) -> DeclaredScheme:
    """Return the scheme of ModelOpt for the `quant_algo` `name` and the `group_size` `group`."""
    size = group if isinstance(group, int) and group > 0 else None
    inputs = _INPUTS.get(name, "") if isinstance(name, str) else ""
    if name in ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"):
        return DeclaredScheme("nvfp4", size or 16, static_input=_STATIC.get(name), inputs=inputs)
    if name == "FP8":
        return DeclaredScheme("fp8", static_input=True, inputs=inputs)
    if name == "FP8_PER_CHANNEL_PER_TOKEN":
        return DeclaredScheme("fp8-channel", inputs=inputs)
    if name in ("FP8_PB_WO", "FP8_PB"):
        return DeclaredScheme("fp8-block", block=(128, 128), inputs=inputs)
    if name == "W4A16_AWQ":
        return DeclaredScheme("int4-awq", size)
    if name in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        return DeclaredScheme("int8", inputs=inputs)
    raise UnsupportedError(
        f"llmc does not read the ModelOpt format {name!r}",
        hint="known: FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4, NVFP4_AWQ, "
        "W4A8_NVFP4_FP8, W4A16_AWQ, W8A16, W8A8_SQ_PER_CHANNEL, MIXED_PRECISION",
    )


def _modelopt(config: Mapping[str, Any]) -> DeclaredSchemes:
    inner = config.get("quantization")
    settings: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    algorithm = settings.get("quant_algo")
    layers = settings.get("quantized_layers")
    if isinstance(layers, dict) and algorithm in ("MIXED_PRECISION", None):
        layer_settings = {
            name: layer if isinstance(layer, dict) else {"quant_algo": layer}
            for name, layer in layers.items()
        }
        groups: Groups = tuple(
            ((name,), _algorithm(layer.get("quant_algo"), layer.get("group_size")))
            for name, layer in layer_settings.items()
        )
    elif algorithm is None or algorithm == "MIXED_PRECISION":
        groups = read_groups(settings, "int4-awq")
    else:
        size = settings.get("group_size") or first_group_size(settings)
        groups = ((("Linear",), _algorithm(algorithm, size)),)
    producer = config.get("producer")
    made_by = producer if isinstance(producer, dict) else {}
    kv = settings.get("kv_cache_quant_algo") or settings.get("kv_cache_scheme")
    label = str(algorithm) if algorithm else describe_groups(groups)
    return DeclaredSchemes(
        method="modelopt",
        label=f"{METHODS['modelopt']} {label}",
        producer=" ".join(str(made_by[key]) for key in ("name", "version") if made_by.get(key)),
        groups=groups,
        exclude=names(settings.get("exclude_modules", settings.get("ignore"))),
        kv_cache=kv_format(kv),
    )


def _compressed_tensors(config: Mapping[str, Any]) -> DeclaredSchemes:
    groups = read_groups(config, "int4-packed")
    status = config.get("quantization_status")
    findings: tuple[Finding, ...] = ()
    if status not in (None, "compressed"):
        findings = (Finding("config", CONFIG, f"quantization_status is {status!r}, not 'compressed'"),)
    return DeclaredSchemes(
        method="compressed-tensors",
        label=f"{METHODS['compressed-tensors']} {config.get('format', describe_groups(groups))}",
        producer=f"compressed-tensors {config['version']}" if config.get("version") else "",
        groups=groups,
        exclude=names(config.get("ignore", [])),
        kv_cache=kv_format(config.get("kv_cache_scheme")),
        findings=findings,
    )


def _fp8(config: Mapping[str, Any]) -> DeclaredSchemes:
    size = config.get("weight_block_size")
    static = config.get("activation_scheme") == "static"
    if (
        isinstance(size, list)
        and len(size) == 2
        and all(type(length) is int and length > 0 for length in size)
    ):
        scheme = DeclaredScheme("fp8-block", block=(size[0], size[1]), static_input=static, inputs="fp8")
    else:
        scheme = DeclaredScheme("fp8", static_input=static, inputs="fp8")
    exclude = config.get("modules_to_not_convert") or config.get("ignored_layers")
    return DeclaredSchemes(
        "fp8",
        METHODS["fp8"],
        "",
        ((("Linear",), scheme),),
        names(exclude),
        kv_format(config.get("kv_cache_scheme")),
    )


def _mxfp4(config: Mapping[str, Any]) -> DeclaredSchemes:
    scheme = DeclaredScheme("mxfp4", group_size=32)
    return DeclaredSchemes(
        method="mxfp4",
        label=METHODS["mxfp4"],
        producer="",
        groups=((("*.experts.*",), scheme),),
        exclude=names(config.get("modules_to_not_convert")),
        kv_cache="",
    )


def _read_json(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / MODELOPT_FILE
    try:
        data = file.read_bytes()
        refuse_lfs_pointer(file, data)
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}", hint="download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object", hint="download it again")
    return value
