"""Pre-quantized checkpoints for engines: formats, arrays, fusion, and refused layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.cli.plan_table import prequantized_plan_lines
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.prequantized.kv_scales import layer_kv_scales
from llmc.compiler.checkpoint.prequantized.layout import read_quantized
from llmc.compiler.quantize.prequantized_arrays import arrays_of
from llmc.compiler.quantize.prequantized_form import joined_format
from llmc.compiler.quantize.prequantized_plan import (
    PrequantizedWeights,
    make_prequantized_plan,
    read_prequantized,
)
from llmc.compiler.quantize.produce import join
from llmc.compiler.quantize.round_to_nearest import dequantize
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets import capability
from llmc.passes.quantize.formats import FORMATS, Format, get_format, systematic_format
from llmc.passes.quantize.plan import fused_groups
from llmc.runtime.errors import CheckpointError, RequestError, UnsupportedError
from support.quantized_layouts import (
    BF16,
    GATE0,
    INTERMEDIATE,
    K0,
    LAYOUTS,
    NVFP4_ARGS,
    Q0,
    Quantizer,
    Written,
    assemble,
    compressed,
    f32,
    float_args,
    fp8,
    modelopt,
    nvfp4,
    packed,
    weights,
)

V0, DOWN0 = Q0.replace("q_proj", "v_proj"), GATE0.replace("gate_proj", "down_proj")
QKV = [Q0, K0, V0]
# layout -> name of the format on a CPU, for matrices of 192 columns and, if it differs, of 320
FORMS = {
    "modelopt-fp8": ("fp8",),
    "modelopt-fp8-channel": ("fp8-per-channel-weight-only",),
    "modelopt-fp8-block": ("fp8-block64-weight-only",),
    "modelopt-nvfp4": ("nvfp4",),
    "modelopt-nvfp4-awq": ("nvfp4",),
    "modelopt-awq": ("int4-block64",),
    "modelopt-int8": ("int8",),
    "ct-fp8": ("fp8",),
    "ct-fp8-dynamic": ("fp8-per-channel-weight-only",),
    "ct-fp8-block": ("fp8-block64-weight-only",),
    "ct-nvfp4": ("nvfp4",),
    "ct-int4": ("int4",),
    "ct-int4-channel": ("int4-per-channel",),
    "ct-int4-asymmetric": ("int8-block64",),
    "ct-int8": ("int8",),
    "ct-w8a8": ("int8",),
    "deepseek": ("fp8-block64-weight-only",),
}
REFUSED = {"ct-int4-reordered": "reordered columns", "ct-int8-asymmetric": "zero points"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    """Return a function that makes a checkpoint. share: all layers share their scales."""

    def make(layout: str, share: bool = True) -> Written:
        quantizer, settings, _ = LAYOUTS[layout]
        return assemble(tmp_path / layout, dict.fromkeys(weights(), quantizer), settings, share)

    return make


def read(made: Written, dtype: str = "fp32", **options: Any) -> PrequantizedWeights:
    target = "cpu" if dtype == "fp32" else "tensorrt-rtx"
    if target != "cpu":
        options.setdefault("sms", (120,))
    request = BuildRequest(str(made.root), Path("x.llmc"), target=target, **options)
    stored = read_prequantized(Checkpoint.open(made.write()), request, dtype)
    assert stored is not None
    for name, module in stored.modules.items():  # as the driver does
        capability.check_prequantized(module.format, name, request.target, request.sms)
    return stored


def mixed(root: Path, quantizer_of: Callable[[str], Quantizer | None], settings: dict[str, Any]) -> Written:
    """Make a checkpoint whose modules are quantized by `quantizer_of` their name; None: not quantized."""

    def plain(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {"weight": w.astype(BF16)}, w

    quantizers = {name: quantizer_of(name) or plain for name in weights()}
    return assemble(root, quantizers, settings)


def test_every_layout_is_covered() -> None:
    assert FORMS.keys() | REFUSED.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", FORMS)
def test_arrays_have_the_values_of_the_checkpoint(
    write: Callable[..., Written], layout: str, dtype: str
) -> None:
    made = write(layout)
    stored = read(made, dtype)
    for name, exact in made.exact.items():
        part = stored.modules[name]
        arrays = arrays_of(part, part.format)
        assert part.format.name == FORMS[layout][0]
        wanted = part.format.layout(exact.shape)
        assert {key: value.shape for key, value in arrays.items()} == {
            key: s for key, (_, s) in wanted.items()
        }
        got = dequantize(arrays, part.format)
        if layout == "ct-nvfp4":  # its global scale is a reciprocal, which is rounded once to fp32
            np.testing.assert_allclose(got, exact, rtol=2**-22, atol=0)
        else:
            np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("share", [True, False], ids=["same scales", "different scales"])
@pytest.mark.parametrize("layout", FORMS)
def test_fused_layers_have_the_values_of_their_parts(
    write: Callable[..., Written], layout: str, share: bool
) -> None:
    made = write(layout, share)
    stored = read(made)
    reason = stored.fusion.why_apart(QKV)
    if "nvfp4" in layout and not share:
        assert reason == "they have different global scales"
        return
    assert reason == ""
    parts = [stored.modules[name] for name in (Q0, K0, V0)]
    fmt = joined_format(parts)
    assert fmt is not None
    one_scale = layout in ("modelopt-fp8", "ct-fp8")
    assert fmt.name == ("fp8-per-channel" if one_scale and not share else FORMS[layout][0])
    got = dequantize(join([arrays_of(part, fmt) for part in parts]), fmt)
    exact = np.concatenate([made.exact[name] for name in (Q0, K0, V0)])
    np.testing.assert_allclose(got, exact, rtol=2**-22 if layout == "ct-nvfp4" else 0, atol=0)


def test_codes_and_scales_keep_the_checkpoints_bytes(write: Callable[..., Written]) -> None:
    made = write("modelopt-nvfp4")
    part = read(made).modules[Q0]
    arrays = arrays_of(part, part.format)
    assert arrays["weight"].tobytes() == made.tensors[f"{Q0}.weight"].tobytes()
    assert arrays["weight_scale"].tobytes() == made.tensors[f"{Q0}.weight_scale"].tobytes()
    assert arrays["weight_scale_2"] == made.tensors[f"{Q0}.weight_scale_2"]
    assert part.input_scale == made.tensors[f"{Q0}.input_scale"]


def test_inverse_scales_become_multipliers_in_fp32(write: Callable[..., Written]) -> None:
    made = write("ct-nvfp4")
    part = read(made).modules[Q0]
    for scale, tensor in (
        (part.global_scale, "weight_global_scale"),
        (part.input_scale, "input_global_scale"),
    ):
        assert scale == np.float32(1 / made.tensors[f"{Q0}.{tensor}"].astype(np.float64)[0])


@pytest.mark.parametrize(
    ("layout", "dtype", "scales"),
    [
        ("ct-fp8-dynamic", "fp32", "BF16"),
        ("ct-fp8-dynamic", "bf16", "BF16"),
        ("ct-fp8-dynamic", "fp16", "F32"),
        ("modelopt-fp8-channel", "bf16", "F32"),
        ("modelopt-fp8", "bf16", "F32"),
        ("modelopt-awq", "fp16", "F32"),
        ("ct-int4", "bf16", "BF16"),
        ("modelopt-nvfp4", "bf16", "F8_E4M3"),
    ],
)
def test_scales_are_never_rounded(
    write: Callable[..., Written], layout: str, dtype: str, scales: str
) -> None:
    assert read(write(layout), dtype).modules[Q0].format.scales == scales


@pytest.mark.parametrize("layout", REFUSED)
def test_unsupported_layouts_are_refused(write: Callable[..., Written], layout: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[layout]) as caught:
        read(write(layout))
    assert Q0 in caught.value.message
    assert caught.value.hint


def test_trivial_group_index_and_zero_points_are_accepted(tmp_path: Path) -> None:
    settings = compressed(
        "pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, None
    )

    def quantize(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tensors, exact = packed(8, 0)(w)
        tensors["weight_zero_point"] = np.full((-(-w.shape[0] // 4), 1), 0x80808080 - 2**32, np.int32)
        tensors["weight_g_idx"] = np.zeros(w.shape[1], np.int32)
        return tensors, exact

    made = mixed(tmp_path / "x", lambda name: quantize, settings)
    part = read(made).modules[DOWN0]
    np.testing.assert_array_equal(dequantize(arrays_of(part, part.format), part.format), made.exact[DOWN0])


# Fusion


def test_layers_with_an_unquantized_one_are_not_fused(tmp_path: Path) -> None:
    settings = modelopt("FP8", exclude_modules=["lm_head", "*.k_proj"])
    made = mixed(tmp_path / "x", lambda name: None if name.endswith("k_proj") else fp8, settings)
    stored = read(made)
    assert stored.fusion.why_apart(QKV) == "some are quantized and some are not"
    assert stored.fusion.why_apart([GATE0, GATE0]) == ""
    assert stored.fusion.why_apart([K0]) == ""
    plan = plan_of(stored)
    kept = {m.name: m.reason for m in plan.modules if not m.format}
    assert kept.keys() == {K0, K0.replace("0", "1"), "lm_head"}
    assert set(kept.values()) == {"not quantized in the checkpoint (in its list of exceptions)"}


def test_layers_of_different_formats_or_input_scales_are_not_fused(tmp_path: Path) -> None:
    layers = {name: {"quant_algo": "FP8" if "k_proj" in name else "NVFP4"} for name in weights()}
    settings = modelopt("MIXED_PRECISION", quantized_layers=layers)
    made = mixed(tmp_path / "x", lambda name: fp8 if "k_proj" in name else nvfp4(), settings)
    stored = read(made)
    assert stored.fusion.why_apart(QKV) == "they are stored as nvfp4 and fp8"
    made.tensors[f"{GATE0}.input_scale"] = f32(0.5)
    up = GATE0.replace("gate", "up")
    assert read(made).fusion.why_apart([GATE0, up]) == "they have different input scales"
    made.tensors[f"{GATE0}.input_scale"] = made.tensors[f"{up}.input_scale"]
    made.tensors[f"{up}.pre_quant_scale"] = np.linspace(1, 2, 192, dtype=np.float32).astype(BF16)
    assert read(made).fusion.why_apart([GATE0, up]) == "they have different pre_quant_scales"
    record = plan_of(stored).record()
    assert record["formats"] == {"nvfp4": 12, "fp8": 2}
    assert record["format"] == "nvfp4 and fp8"
    assert record["recipe"] == "ModelOpt MIXED_PRECISION"
    assert record["producer"] == "modelopt 0.33.0"


def plan_of(stored: PrequantizedWeights) -> Any:
    shapes = {name: weight.shape for name, weight in weights().items()} | {"lm_head": (96, 192)}
    apart = {f: stored.fusion.why_apart(f) for f in fused_groups(shapes)}
    groups = [group for group, reason in apart.items() if not reason]
    joined = {name for group in groups for name in group}
    groups += [(name,) for name in shapes if name not in joined]
    return make_prequantized_plan(stored, shapes, groups, stored_bits=16, other_params=1000)


def test_plan_counts_the_bytes_of_the_arrays_and_names_the_scheme(tmp_path: Path) -> None:
    made = mixed(
        tmp_path / "x",
        lambda name: nvfp4(inverse=True),
        compressed("nvfp4-pack-quantized", NVFP4_ARGS, NVFP4_ARGS | {"dynamic": "local"}),
    )
    plan = plan_of(read(made))
    arrays = [(192 + 2 * 64) * 192, 192 * 192, 2 * INTERMEDIATE * 192, 192 * INTERMEDIATE]
    assert plan.bytes_after == 2 * 96 * 192 + 2000 + 2 * sum(size // 2 + size // 16 + 4 for size in arrays)
    lines = prequantized_plan_lines(plan)
    assert "codes and scales of the checkpoint: compressed-tensors nvfp4-pack-quantized" in lines
    assert any(line.startswith("14 of 15 matrices in nvfp4: ") for line in lines)


@pytest.mark.parametrize(
    ("layout", "note"),
    [
        ("ct-fp8-dynamic", "inputs, fp8 in the recipe, are not quantized (14 modules)"),
        ("ct-w8a8", "inputs, fp8 in the recipe, are not quantized (14 modules)"),
        ("modelopt-int8", "inputs, int8 in the recipe, are not quantized (14 modules)"),
        ("deepseek", "inputs, fp8 in the recipe, are not quantized (14 modules)"),
        ("modelopt-fp8", None),
        ("ct-int4", None),
        ("modelopt-nvfp4", None),
    ],
)
def test_notes_name_the_omitted_activation_quantization(
    write: Callable[..., Written], layout: str, note: str | None
) -> None:
    plan = plan_of(read(write(layout)))
    assert plan.notes == ((note,) if note else ())
    assert plan.record()["notes"] == list(plan.notes)


def test_weight_only_nvfp4_and_nvfp4_with_fp8_inputs(tmp_path: Path) -> None:
    def without_input(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tensors, exact = nvfp4()(w)
        del tensors["input_scale"]
        return tensors, exact

    made = mixed(tmp_path / "a", lambda name: without_input, modelopt("W4A16_NVFP4"))
    assert read(made).modules[Q0].format == FORMATS["nvfp4-weight-only"]
    made = mixed(tmp_path / "b", lambda name: nvfp4(), modelopt("W4A8_NVFP4_FP8"))
    assert read(made).modules[Q0].format.name == "nvfp4-fp8-inputs"


# Names


@pytest.mark.parametrize("codes", ["int8", "int4", "e4m3", "e2m1"])
@pytest.mark.parametrize("block", [-1, 0, 16, 32, 64])
@pytest.mark.parametrize("activations", ["", "e4m3", "e2m1"])
def test_format_names_encode_all_but_the_dtype_of_scales(codes: str, block: int, activations: str) -> None:
    usual = {"int8": ("", "e4m3"), "int4": ("", "e4m3"), "e4m3": ("", "e4m3"), "e2m1": ("", "e4m3", "e2m1")}
    if activations not in usual[codes] or (block == -1 and codes != "e4m3"):
        return
    scales = "F8_E4M3" if codes == "e2m1" else "F32"
    fmt = systematic_format(codes, block, scales, activations)
    assert fmt == Format(fmt.name, codes, block, scales, activations)


def test_formats_of_quant_follow_the_naming_scheme() -> None:
    for name, fmt in FORMATS.items():
        if fmt.smoothed:
            continue  # named after its method
        assert systematic_format(fmt.element, fmt.block, fmt.scales, fmt.activations) == fmt
        assert fmt.name == name
    with pytest.raises(RequestError):
        get_format("int4-block64")  # checkpoints may have it, but --quant does not make it


# Refusals


def test_quant_of_a_prequantized_checkpoint_is_refused(write: Callable[..., Written]) -> None:
    with pytest.raises(RequestError, match=r"--quant int8: .* quantized already \(ModelOpt FP8\)") as caught:
        read(write("modelopt-fp8"), quant="int8")
    assert "leave --quant out" in caught.value.hint


def test_contradictory_layout_names_the_tensor(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    del made.tensors[f"{K0}.weight_scale"]
    with pytest.raises(CheckpointError, match=f"{K0}.weight its weight_scale is missing") as caught:
        read(made)
    assert "llmc check" in caught.value.hint


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_nonpositive_scales_are_refused(write: Callable[..., Written], value: float) -> None:
    made = write("ct-int4")
    made.tensors[f"{K0}.weight_scale"][3, 1] = value
    part = read(made).modules[K0]
    with pytest.raises(CheckpointError, match=f"{K0}.weight_scale has scales"):
        arrays_of(part, part.format)
    made = write("modelopt-fp8")
    made.tensors[f"{K0}.input_scale"] = f32(value)
    with pytest.raises(CheckpointError, match=f"{K0}.input_scale is"):
        read(made)


def test_quantized_embedding_is_refused(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    made.said["exclude_modules"] = ["lm_head"]
    table, _ = fp8(made.tensors["model.embed_tokens.weight"].astype(np.float32))
    made.tensors |= {f"model.embed_tokens.{last}": value for last, value in table.items()}
    with pytest.raises(UnsupportedError, match=r"module model\.embed_tokens is quantized") as caught:
        plan_of(read(made))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("layout", "sms", "needs"),
    [
        ("modelopt-fp8", (), "SM89"),
        ("modelopt-fp8", (86, 89), "SM89"),
        ("modelopt-nvfp4", (89,), "SM100"),
        ("ct-int4", (75,), "SM80"),
    ],
)
def test_gpus_without_the_format_are_refused(
    write: Callable[..., Written], layout: str, sms: tuple[int, ...], needs: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"needs {needs} or newer") as caught:
        read(write(layout), "bf16", sms=sms)
    assert "--sm" in caught.value.hint
    assert read(write("ct-int4"), "bf16", sms=()).modules  # portable engines support integers


def test_fp8_blocks_with_static_activation_scales_need_the_cpu(tmp_path: Path) -> None:
    def quantize(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tensors, exact = LAYOUTS["ct-fp8-block"][0](w)
        return tensors | {"input_scale": f32(0.1)}, exact

    block = float_args(8, "block", block_structure=[128, 128])
    made = mixed(
        tmp_path / "x", lambda name: quantize, compressed("float-quantized", block, float_args(8, "tensor"))
    )
    assert read(made).modules[Q0].format.name == "fp8-block64"
    with pytest.raises(UnsupportedError, match="static activation scales"):
        read(made, "bf16")


def test_unquantized_checkpoint_returns_none(tmp_path: Path) -> None:
    made = mixed(tmp_path / "x", lambda name: None, {})
    request = BuildRequest("x", Path("x.llmc"), quant="int8")
    assert read_prequantized(Checkpoint.open(made.write()), request, "fp32") is None


# KV scales


def test_kv_scales_are_read(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    assert read(made).largest_kv == {}
    made.said["kv_cache_quant_algo"] = "FP8"
    made.tensors |= {f"{K0}.k_scale": f32(0.5), f"{V0}.v_scale": f32(0.25)}
    made.tensors["model.layers.1.self_attn.k_scale"] = np.array([2], BF16)
    stored = read(made)
    assert stored.largest_kv == {0: (0.5 * 448, 0.25 * 448), 1: (2.0 * 448, 448)}
    assert stored.notes == ("the KV cache, FP8 in the recipe, is not quantized",)
    made.tensors[f"{K0}.k_scale"] = f32(0)
    with pytest.raises(CheckpointError, match="not one positive number"):
        layer_kv_scales(read_quantized(Checkpoint.open(made.write())))


@pytest.mark.parametrize(
    ("said", "largest"),
    [
        ({}, 448),
        ({"kv_cache_quant_algo": "FP8"}, 448),
        ({"kv_cache_scheme": float_args(8, "tensor")}, 448),
        ({"kv_cache_quant_algo": "NVFP4"}, 2688),
        ({"kv_cache_quant_algo": "INT8"}, 127),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int", "symmetric": True}}, 127),
    ],
)
def test_kv_scales_give_the_largest_magnitudes(
    write: Callable[..., Written], said: dict[str, Any], largest: float
) -> None:
    """largest: the largest magnitude of the codes, times the scales of blocks."""
    made, amax = write("modelopt-fp8"), np.array([12, 6], np.float32)
    made.said.update(said)
    key, value = amax / np.float32(largest)
    made.tensors |= {f"{K0}.k_scale": f32(key), f"{V0}.v_scale": f32(value)}
    stored = read(made, "bf16", kv_dtype="fp8")
    np.testing.assert_allclose(stored.largest_kv[0], amax, rtol=1e-6)
    assert stored.notes == ()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"kv_cache_quant_algo": "NVFP4_AFFINE"}, "NVFP4_AFFINE"),
        ({"kv_cache_quant_algo": "FP6"}, "FP6"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int", "symmetric": False}}, "INT8_AFFINE"),
    ],
)
def test_kv_scales_of_unknown_formats_are_ignored_with_a_note(
    write: Callable[..., Written], said: dict[str, Any], kind: str
) -> None:
    made = write("modelopt-fp8")
    made.said.update(said)
    made.tensors |= {f"{K0}.k_scale": f32(0.5), f"{V0}.v_scale": f32(0.25)}
    stored = read(made, "bf16", kv_dtype="fp8")
    assert stored.largest_kv == {}
    note = f"the KV cache's scales, {kind} in the recipe, are not used: they are 1.0"
    assert plan_of(stored).notes == (note,)
