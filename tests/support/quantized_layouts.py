"""Checkpoints in the published quantized layouts, written for tests.

The writers follow the descriptions of the formats and share nothing with llmc's readers. ml_dtypes makes the
codes, shifts pack them, and the weight that they stand for is computed from the codes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmc.compiler.checkpoint.check.check import check_checkpoint
from llmc.compiler.checkpoint.finding import REMEDIES, Finding
from llmc.runtime.dtypes import BY_NUMPY

E4M3, E2M1, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.bfloat16
HIDDEN, INTERMEDIATE, KV = 192, 320, 64  # one and a half, and two and a half, blocks of 128
# A Llama of these sizes, as transformers reads it.
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
Q0, K0, GATE0 = (f"model.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
Tensors = dict[str, np.ndarray]
Quantizer = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]


def f32(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


# Quantizers: weight [out, in] -> tensors by the last part of their names, and the dequantized weight


def fp8(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scale = f32(np.abs(w).max() / 448)
    codes = (w / scale).astype(E4M3)
    return {"weight": codes, "weight_scale": scale, "input_scale": f32(0.02)}, codes.astype(
        np.float32
    ) * scale


def fp8_channel(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scale = np.abs(w).max(1, keepdims=True) / np.float32(448)
    codes = (w / scale).astype(E4M3)
    return {"weight": codes, "weight_scale": scale[:, 0]}, codes.astype(np.float32) * scale


def fp8_channel_bf16(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """compressed-tensors' FP8_DYNAMIC: scales [out, 1] in the model's dtype."""
    scale = (np.abs(w).max(1, keepdims=True) / 448).astype(BF16)
    codes = np.clip(w / scale.astype(np.float32), -448, 448).astype(E4M3)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale.astype(np.float32)


def fp8_block(name: str, dims: int = 2) -> Quantizer:
    """Return a quantizer of FP8 in blocks of 128 x 128. name, dims: of the tensor with the scales."""

    def quantize(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        rows, columns = (-(-size // 128) for size in w.shape)
        scale, codes, exact = np.empty((rows, columns), np.float32), np.empty(w.shape, E4M3), np.empty_like(w)
        for r in range(rows):
            for c in range(columns):
                part = np.s_[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
                scale[r, c] = np.abs(w[part]).max() / 448
                codes[part] = (w[part] / scale[r, c]).astype(E4M3)
                exact[part] = codes[part].astype(np.float32) * scale[r, c]
        stored = scale if dims == 2 else scale[:, None, :, None]
        return {"weight": codes, name: stored}, exact

    return quantize


def nvfp4(*, inverse: bool = False, awq: bool = False) -> Quantizer:
    """Return a quantizer of NVFP4.

    inverse: as compressed-tensors writes it: global scales are stored as inverses, under other names.
    awq: add ModelOpt's `pre_quant_scale`.
    """

    def quantize(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        blocks = w.reshape(w.shape[0], -1, 16)
        global_scale = f32(np.abs(w).max() / (6 * 448))
        stored = f32(1) / global_scale if inverse else global_scale
        block_scale = np.clip(np.abs(blocks).max(2) / (6 * global_scale), 2**-9, 448).astype(E4M3)
        exact_scale = block_scale.astype(np.float32)
        step = (exact_scale / stored if inverse else exact_scale * stored)[:, :, None]
        codes = (blocks / step).astype(E2M1)
        exact = (codes.astype(np.float32) * step).reshape(w.shape)
        bits = codes.view(np.uint8).reshape(w.shape) & 15
        packed = bits[:, 0::2] | bits[:, 1::2] << 4  # the even index is in the low nibble
        names = (
            ("weight_packed", "weight_global_scale", "input_global_scale")
            if inverse
            else ("weight", "weight_scale_2", "input_scale")
        )
        step_of_input = f32(7.5 / 2688)
        values = (packed, stored, 1 / step_of_input if inverse else step_of_input)
        tensors = dict(zip(names, values, strict=True)) | {"weight_scale": block_scale}
        if inverse:  # compressed-tensors writes [1]
            tensors |= {name: tensors[name].reshape(1) for name in names[1:]}
        if awq:
            tensors["pre_quant_scale"] = np.linspace(0.5, 2, w.shape[1], dtype=np.float32).astype(BF16)
        return tensors, exact

    return quantize


def int4_awq(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    groups = w.reshape(w.shape[0], -1, 64)
    scale = np.abs(groups).max(2) / np.float32(7)
    codes = np.clip(np.round(groups / scale[:, :, None]), -8, 7).astype(np.int8)
    exact = (codes.astype(np.float32) * scale[:, :, None]).reshape(w.shape)
    bits = codes.reshape(w.shape).view(np.uint8) & 15
    packed = bits[0::2] | bits[1::2] << 4  # pairs along `out`
    return {
        "weight": packed,
        "weight_scale": scale,
        "pre_quant_scale": np.ones(w.shape[1], np.float32),
    }, exact


def to_int32(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack as compressed-tensors' pack_to_int32, along the last axis: unsigned, the first value lowest."""
    per_word = 32 // bits
    raw = (codes.astype(np.int64) + (1 << (bits - 1))).astype(np.uint32)
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % per_word)))
    words = np.zeros((raw.shape[0], raw.shape[1] // per_word), np.uint32)
    for index in range(per_word):
        words |= raw[:, index::per_word] << np.uint32(index * bits)
    return words.view(np.int32)


def packed(bits: int, group: int, symmetric: bool = True, shuffle: bool = False) -> Quantizer:
    """Return a quantizer of `pack-quantized`.

    group: columns to a scale; 0: the whole row. shuffle: columns belong to groups in another order
        (weight_g_idx).
    """

    def quantize(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        rows, columns = w.shape
        order = np.random.default_rng(1).permutation(columns) if shuffle else np.arange(columns)
        groups = w[:, order].reshape(rows, -1, group or columns)
        high = (1 << (bits - 1)) - 1
        if symmetric:
            scale = (np.abs(groups).max(2) / high).astype(BF16)
            zero = np.zeros(scale.shape, np.int8)
        else:
            low_value, high_value = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
            scale = ((high_value - low_value) / (2 * high + 1)).astype(BF16)
            zero = np.clip(np.round(-high - 1 - low_value / scale.astype(np.float32)), -high - 1, high)
            zero = zero.astype(np.int8)
        step = scale.astype(np.float32)[:, :, None]
        offset = zero.astype(np.float32)[:, :, None]
        codes = np.clip(np.round(groups / step) + offset, -high - 1, high)
        exact, stored = np.empty_like(w), np.empty(w.shape, np.int8)
        exact[:, order] = ((codes - offset) * step).astype(np.float32).reshape(w.shape)
        stored[:, order] = codes.astype(np.int8).reshape(w.shape)
        tensors = {
            "weight_packed": to_int32(stored, bits),
            "weight_scale": scale,
            "weight_shape": np.array(w.shape, np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(to_int32(zero.T, bits).T)
        if shuffle:
            index = np.empty(columns, np.int32)
            index[order] = np.arange(columns) // group
            tensors["weight_g_idx"] = index
        return tensors, exact

    return quantize


def int8(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
    codes = np.round(w / scale).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale


# Configurations, as producers write them


def modelopt(algorithm: str | None, **more: Any) -> dict[str, Any]:
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]} | more
    return {"hf_quant": {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": said}}


def compressed(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return {"quantization_config": config}


def float_args(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    } | more


def int_args(bits: int, group: int | None, symmetric: bool = True) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    return {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "symmetric": symmetric,
        "group_size": group,
    }


NVFP4_ARGS = float_args(4, "tensor_group", group_size=16)
TOKEN = float_args(8, "token", dynamic=True)
# name -> quantizer, configuration, format in the report of `llmc check`
LAYOUTS: dict[str, tuple[Quantizer, dict[str, Any], str]] = {
    "modelopt-fp8": (fp8, modelopt("FP8"), "fp8"),
    "modelopt-fp8-channel": (fp8_channel, modelopt("FP8_PER_CHANNEL_PER_TOKEN"), "fp8-channel"),
    "modelopt-fp8-block": (fp8_block("weight_scale", 4), modelopt("FP8_PB_WO"), "fp8-block of 128 x 128"),
    "modelopt-nvfp4": (nvfp4(), modelopt("NVFP4", group_size=16), "nvfp4 in groups of 16"),
    "modelopt-nvfp4-awq": (nvfp4(awq=True), modelopt("NVFP4_AWQ"), "nvfp4 in groups of 16"),
    "modelopt-awq": (int4_awq, modelopt("W4A16_AWQ", group_size=64), "int4-awq in groups of 64"),
    "modelopt-int8": (int8, modelopt("W8A8_SQ_PER_CHANNEL"), "int8"),
    "ct-fp8": (
        fp8,
        compressed("float-quantized", float_args(8, "tensor"), float_args(8, "tensor")),
        "fp8",
    ),
    "ct-fp8-dynamic": (
        fp8_channel_bf16,
        compressed("float-quantized", float_args(8, "channel"), TOKEN),
        "fp8-channel",
    ),
    "ct-fp8-block": (
        fp8_block("weight_scale"),
        compressed("float-quantized", float_args(8, "block", block_structure=[128, 128]), TOKEN),
        "fp8-block of 128 x 128",
    ),
    "ct-nvfp4": (
        nvfp4(inverse=True),
        compressed("nvfp4-pack-quantized", NVFP4_ARGS, NVFP4_ARGS | {"dynamic": "local"}),
        "nvfp4 in groups of 16",
    ),
    "ct-int4": (
        packed(4, 32),
        compressed("pack-quantized", int_args(4, 32), None),
        "int4-packed in groups of 32",
    ),
    "ct-int4-channel": (packed(4, 0), compressed("pack-quantized", int_args(4, None), None), "int4-packed"),
    "ct-int4-asymmetric": (
        packed(4, 64, symmetric=False),
        compressed("pack-quantized", int_args(4, 64, False), None),
        "int4-packed in groups of 64",
    ),
    "ct-int4-reordered": (
        packed(4, 64, shuffle=True),
        compressed("pack-quantized", int_args(4, 64), None),
        "int4-packed in groups of 64",
    ),
    "ct-int8": (packed(8, 0), compressed("pack-quantized", int_args(8, None), None), "int8-packed"),
    "ct-int8-asymmetric": (
        packed(8, 64, symmetric=False),
        compressed("pack-quantized", int_args(8, 64, False), None),
        "int8-packed in groups of 64",
    ),
    "ct-w8a8": (int8, compressed("int-quantized", int_args(8, None), TOKEN), "int8"),
    "deepseek": (
        fp8_block("weight_scale_inv"),
        {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "weight_block_size": [128, 128],
                "activation_scheme": "dynamic",
            }
        },
        "fp8-block of 128 x 128",
    ),
}


class Written:
    """A checkpoint directory, whose tensors and configuration a test can change and write again."""

    def __init__(self, root: Path, tensors: Tensors, exact: Tensors, settings: dict[str, Any]) -> None:
        self.root, self.tensors, self.exact = root, tensors, exact
        self.config = {"model_type": "llama", "hidden_size": HIDDEN, "torch_dtype": "bfloat16"}
        self.hf_quant = json.loads(json.dumps(settings.get("hf_quant")))
        if "quantization_config" in settings:
            self.config["quantization_config"] = json.loads(json.dumps(settings["quantization_config"]))

    @property
    def said(self) -> dict[str, Any]:
        """The settings of the quantization in the configuration."""
        return self.hf_quant["quantization"] if self.hf_quant else self.config["quantization_config"]

    def write(self) -> Path:
        self.root.mkdir(exist_ok=True)
        (self.root / "config.json").write_text(json.dumps(self.config))
        if self.hf_quant:
            (self.root / "hf_quant_config.json").write_text(json.dumps(self.hf_quant))
        save(self.root / "model.safetensors", self.tensors)
        return self.root

    def findings(self, full: bool = False) -> list[Finding]:
        return list(check_checkpoint(self.write(), full).findings)

    def finding(self, kind: str, tensor: str, warning: bool = False) -> str:
        """Return the text of the only finding, which must be of this kind and about this tensor."""
        [found] = self.findings()
        assert (found.kind, found.tensor, found.warning) == (kind, tensor, warning), found
        assert found.kind in REMEDIES
        return found.what


def save(file: Path, tensors: Tensors) -> None:
    header, end = {}, 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        dtype = BY_NUMPY[value.dtype.name].safetensors
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def weights() -> Tensors:
    draw = np.random.default_rng(0)
    return {
        f"model.layers.{layer}.{end}": draw.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        for layer in (0, 1)
        for end, shape in LINEARS.items()
    }


def assemble(
    root: Path, quantizers: dict[str, Quantizer], settings: dict[str, Any], share: bool = True
) -> Written:
    draw = np.random.default_rng(3)
    plain = {
        "model.embed_tokens.weight": draw.normal(size=(96, HIDDEN)).astype(BF16),
        "lm_head.weight": draw.normal(size=(96, HIDDEN)).astype(BF16),
        "model.norm.weight": np.ones(HIDDEN, BF16),
    }
    for layer in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, BF16)
    exact: Tensors = {}
    for name, weight in weights().items():
        if share:
            weight = np.clip(weight, -0.2, 0.2)
            weight[0, 0] = 0.2  # the same largest magnitude, hence the same global scale
        tensors, exact[name] = quantizers[name](weight)
        plain |= {f"{name}.{last}": value for last, value in tensors.items()}
    return Written(root, plain, exact, settings)
