"""Pre-quantized checkpoints in every published layout: reading them, and finding their faults.

tests/support/quantized_layouts.py writes them.
"""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.checkpoint.check.check import check_checkpoint
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.prequantized.dequantize import dequantize, iter_rows
from llmc.compiler.checkpoint.prequantized.layout import read_quantized
from llmc.compiler.checkpoint.prequantized.patterns import matches
from llmc.runtime.errors import CheckpointError, LlmcError, UnsupportedError
from support.quantized_layouts import (
    BF16,
    E4M3,
    GATE0,
    HIDDEN,
    K0,
    LAYOUTS,
    NVFP4_ARGS,
    Q0,
    Tensors,
    Written,
    assemble,
    f32,
    float_args,
    fp8,
    modelopt,
    nvfp4,
    weights,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    """Return a function that makes a valid checkpoint. share: all linear layers share their scales."""

    def make(layout: str, share: bool = True) -> Written:
        quantizer, settings, _ = LAYOUTS[layout]
        return assemble(tmp_path / layout, dict.fromkeys(weights(), quantizer), settings, share)

    return make


# Every layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantizes_every_layout_exactly(write: Callable[..., Written], layout: str) -> None:
    made = write(layout)
    quantized = read_quantized(Checkpoint.open(made.write()))
    assert quantized.modules.keys() == made.exact.keys()
    assert quantized.findings == ()
    for name, exact in made.exact.items():
        module = quantized.modules[name]
        assert module.shape == exact.shape
        np.testing.assert_array_equal(dequantize(module), exact)
        blocks = list(iter_rows(module, 4 * exact.shape[1] * 30))
        assert max(block.shape[0] for block in blocks) == 30
        np.testing.assert_array_equal(np.concatenate(blocks), exact)
        for rows in (slice(3, 8), slice(127, 130), slice(exact.shape[0] - 1, None), slice(5, 5)):
            got = dequantize(module, rows)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, exact[rows])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_valid_checkpoint_has_no_findings(write: Callable[..., Written], layout: str) -> None:
    made = write(layout)
    for full in (False, True):
        report = check_checkpoint(made.write(), full)
        assert report.findings == ()
    assert report.formats == {LAYOUTS[layout][2]: 14}
    assert report.excluded == (() if layout == "deepseek" else ("lm_head",))
    values = sum(value.size for value in made.exact.values())
    plain = sum(value.size for name, value in made.tensors.items() if "proj" not in name)
    assert report.parameters == values + plain
    assert report.bits_per_parameter == 8 * report.bytes / report.parameters
    assert 4 < report.quantized_bits < (5.5 if "4" in layout or "awq" in layout else 8.5)


def test_module_has_the_role_of_every_tensor(write: Callable[..., Written]) -> None:
    quantized = read_quantized(Checkpoint.open(write("ct-nvfp4").write()))
    module = quantized.modules[Q0]
    assert (module.format, module.group_size, module.block) == ("nvfp4", 16, (1, 16))
    assert {role: ref.name.rpartition(".")[2] for role, ref in module.tensors.items()} == {
        "weight": "weight_packed",
        "weight_scale": "weight_scale",
        "inverse_global_scale": "weight_global_scale",
        "inverse_input_scale": "input_global_scale",
    }
    block = read_quantized(Checkpoint.open(write("deepseek").write())).modules[Q0]
    assert (block.format, block.group_size, block.block) == ("fp8-block", None, (128, 128))


def test_mixed_precision(tmp_path: Path) -> None:
    """Modules of different formats, which ModelOpt lists in `quantized_layers`."""
    quantizers, layers = {}, {}
    for index, name in enumerate(weights()):
        attention = "self_attn" in name
        quantizers[name] = fp8 if attention else nvfp4()
        layers[name] = {"quant_algo": "FP8"} if attention else {"quant_algo": "NVFP4", "group_size": 16}
        del index
    made = assemble(
        tmp_path / "mixed",
        quantizers,
        modelopt("MIXED_PRECISION", quantized_layers=layers, exclude_modules=[]),
    )
    report = check_checkpoint(made.write())
    assert report.findings == ()
    assert report.formats == {"fp8": 8, "nvfp4 in groups of 16": 6}
    del made.said["quantized_layers"][Q0]
    assert "does not name it" in made.finding("exclude", f"{Q0}.weight")
    made.said["quantized_layers"][Q0] = {"quant_algo": "NVFP4", "group_size": 16}
    assert "is fp8 (F8_E4M3 [192, 192]), but the configuration says nvfp4" in made.finding(
        "format", f"{Q0}.weight"
    )


def test_modelopt_in_config_json(write: Callable[..., Written]) -> None:
    """ModelOpt's newer configuration, alone and beside hf_quant_config.json."""
    made = write("modelopt-nvfp4")
    group = {"weights": NVFP4_ARGS, "input_activations": NVFP4_ARGS, "targets": ["Linear"]}
    made.config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.39.0"},
    }
    for layer in (0, 1):
        made.tensors[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = f32(1)
        made.tensors[f"model.layers.{layer}.self_attn.v_proj.v_scale"] = f32(0.5)
    report = check_checkpoint(made.write())
    assert report.findings == ()
    assert (report.quantization, report.producer) == ("ModelOpt NVFP4", "modelopt 0.39.0")
    assert (report.kv_cache, report.kv_scales) == ("FP8", 4)
    made.said["quant_algo"] = "FP8"
    assert (
        made.finding("config", "hf_quant_config.json")
        == "declares ModelOpt FP8, but config.json declares ModelOpt NVFP4"
    )
    made.said.update(quant_algo="NVFP4", exclude_modules=["lm_head", "model.layers.9*"])
    assert "'model.layers.9*'" in made.finding("config", "hf_quant_config.json", warning=True)
    made.hf_quant = None
    (made.root / "hf_quant_config.json").unlink()
    assert made.findings() == []


def test_group_size_is_read_from_the_tensors_where_the_file_omits_it(write: Callable[..., Written]) -> None:
    made = write("modelopt-awq")
    del made.said["group_size"]
    assert check_checkpoint(made.write()).formats == {"int4-awq in groups of 64": 14}


# Faults, each alone in an otherwise valid checkpoint


def test_fp8_labelled_nvfp4(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    made.said["quant_algo"] = "NVFP4"
    found = made.findings()
    assert len(found) == 14
    assert {one.kind for one in found} == {"format"}
    assert found[0].what == "is fp8 (F8_E4M3 [192, 192]), but the configuration says nvfp4"


def test_fp8_bytes_stored_as_nvfp4(write: Callable[..., Written]) -> None:
    made = write("modelopt-nvfp4")
    draw = np.random.default_rng(5)
    byte = draw.integers(0, 0x70, (HIDDEN, HIDDEN), np.uint8)
    made.tensors[f"{Q0}.weight"] = byte
    assert "groups of 32, but the configuration says 16, or the weight is FP8 bytes" in made.finding(
        "shape", f"{Q0}.weight_scale"
    )
    made.tensors[f"{Q0}.weight_scale"] = np.ones((HIDDEN, HIDDEN // 8), E4M3)  # consistent, but twice as wide
    assert "hidden_size is 192: these are FP8 bytes" in made.finding("format", f"{Q0}.weight")


@pytest.mark.parametrize(
    ("layout", "last", "missing"),
    [
        ("modelopt-fp8", "weight_scale", "weight_scale"),
        ("modelopt-fp8", "input_scale", "input_scale"),
        ("modelopt-nvfp4", "weight_scale", "weight_scale"),
        ("modelopt-nvfp4", "weight_scale_2", "weight_scale_2"),
        ("modelopt-nvfp4", "input_scale", "input_scale"),
        ("modelopt-awq", "weight_scale", "weight_scale"),
        ("ct-nvfp4", "weight_global_scale", "weight_global_scale"),
        ("ct-nvfp4", "input_global_scale", "input_global_scale"),
        ("ct-int4", "weight_scale", "weight_scale"),
        ("ct-int4", "weight_shape", "weight_shape"),
        ("ct-int4-asymmetric", "weight_zero_point", "weight_zero_point"),
        ("deepseek", "weight_scale_inv", "weight_scale"),
    ],
)
def test_missing_scales(write: Callable[..., Written], layout: str, last: str, missing: str) -> None:
    made = write(layout)
    del made.tensors[f"{K0}.{last}"]
    weight = next(name for name in made.tensors if name in (f"{K0}.weight", f"{K0}.weight_packed"))
    assert f"its {missing} is missing" in made.finding("missing", weight)


@pytest.mark.parametrize("layout", ["modelopt-fp8", "ct-nvfp4", "ct-int4", "deepseek"])
def test_scales_without_a_weight(write: Callable[..., Written], layout: str) -> None:
    made = write(layout)
    made.tensors.pop(f"{K0}.weight", None)
    made.tensors.pop(f"{K0}.weight_packed", None)
    [found] = made.findings()
    assert found.kind == "missing"
    assert found.tensor.startswith(K0)


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "1 NaN"), (np.inf, "1 infinite"), (0, "1 zero"), (-1, "1 negative")]
)
@pytest.mark.parametrize(
    ("layout", "last"),
    [("modelopt-fp8", "weight_scale"), ("modelopt-fp8", "input_scale"), ("ct-nvfp4", "weight_global_scale")],
)
def test_invalid_scales(
    write: Callable[..., Written], layout: str, last: str, value: float, what: str
) -> None:
    made = write(layout)
    name = f"{GATE0}.{last}"
    made.tensors[name] = np.full_like(made.tensors[name], value)
    found = [one for one in made.findings() if not one.warning]
    assert [(one.kind, one.tensor, one.what) for one in found] == [("value", name, f"{what} of 1 values")]


def test_invalid_scales_are_counted(write: Callable[..., Written]) -> None:
    made = write("modelopt-nvfp4")
    scales = made.tensors[f"{K0}.weight_scale"]
    scales[-1, -1], scales[0, 0], scales[1, 2] = np.nan, 0, -1
    assert made.finding("value", f"{K0}.weight_scale") == "1 NaN and 1 zero and 1 negative of 768 values"


def test_nan_codes(write: Callable[..., Written]) -> None:
    made = write("deepseek")
    made.tensors[f"{K0}.weight"][7, 7] = np.nan
    assert made.finding("value", f"{K0}.weight") == "has codes that are NaN"


def test_invalid_values_in_unquantized_tensors(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    made.tensors["model.norm.weight"][3] = np.inf
    assert made.finding("value", "model.norm.weight") == "1 infinite of 192 values"


def test_full_check_reads_rows_outside_the_samples(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    table = np.ones((4096, HIDDEN), BF16)
    table[700, 0] = np.nan
    made.tensors["model.embed_tokens.weight"] = table
    assert made.findings() == []
    [found] = made.findings(full=True)
    assert found.what == "1 NaN of 786,432 values"


@pytest.mark.parametrize(
    ("layout", "said", "stored"),
    [("ct-int4", 64, "32"), ("ct-int4-asymmetric", 32, "64"), ("modelopt-awq", 96, "64")],
)
def test_wrong_group_size(write: Callable[..., Written], layout: str, said: int, stored: str) -> None:
    made = write(layout)
    if layout.startswith("ct"):
        made.said["config_groups"]["group_0"]["weights"]["group_size"] = said
    else:
        made.said["group_size"] = said
    found = made.findings()
    assert {one.kind for one in found} == {"shape"}
    assert len(found) == 14
    assert f"groups of {stored}, but the configuration says {said}" in found[0].what
    assert found[0].tensor == f"{Q0}.weight_scale"


@pytest.mark.parametrize(
    ("layout", "last", "shape", "dtype", "what"),
    [
        ("modelopt-nvfp4", "weight_scale", (64, 6), E4M3, "groups of 32, but the configuration says 16"),
        ("modelopt-nvfp4", "weight_scale", (64, 5), E4M3, "does not divide"),
        ("modelopt-nvfp4", "weight_scale", (12, 64), E4M3, "does not divide"),
        ("ct-nvfp4", "weight_global_scale", (2,), np.float32, "not one number"),
        ("deepseek", "weight_scale_inv", (2, 2), np.float32, "blocks of [128, 128] in [64, 192] need [1, 2]"),
        ("modelopt-fp8-channel", "weight_scale", (65,), np.float32, "does not divide"),
        ("ct-int4", "weight_shape", (3,), np.int64, "has another shape"),
        ("ct-int4-asymmetric", "weight_zero_point", (8, 4), np.int32, "not [8, 3]"),
        ("modelopt-nvfp4-awq", "pre_quant_scale", (191,), BF16, "not [192]"),
    ],
)
def test_wrong_shapes(
    write: Callable[..., Written], layout: str, last: str, shape: tuple[int, ...], dtype: Any, what: str
) -> None:
    made = write(layout)
    made.tensors[f"{K0}.{last}"] = np.ones(shape, dtype)
    assert what in made.finding("shape", f"{K0}.{last}")


def test_wrong_dtypes(write: Callable[..., Written]) -> None:
    made = write("modelopt-nvfp4")
    made.tensors[f"{K0}.weight_scale"] = made.tensors[f"{K0}.weight_scale"].astype(np.float32)
    assert made.finding("dtype", f"{K0}.weight_scale") == "is F32; nvfp4 has F8_E4M3"


@pytest.mark.parametrize("layout", ["modelopt-fp8", "ct-nvfp4", "deepseek"])
def test_quantized_but_excluded(write: Callable[..., Written], layout: str) -> None:
    made = write(layout)
    key = {"modelopt-fp8": "exclude_modules", "ct-nvfp4": "ignore"}.get(layout, "modules_to_not_convert")
    made.said[key] = ["lm_head", K0]
    weight = f"{K0}.weight_packed" if layout == "ct-nvfp4" else f"{K0}.weight"
    assert "but the configuration excludes it" in made.finding("exclude", weight)


@pytest.mark.parametrize("layout", ["modelopt-fp8", "ct-int4", "deepseek"])
def test_unquantized_but_not_excluded(write: Callable[..., Written], layout: str) -> None:
    made = write(layout)
    for name in [name for name in made.tensors if name.startswith(f"{K0}.")]:
        del made.tensors[name]
    made.tensors[f"{K0}.weight"] = made.exact[K0].astype(BF16)
    assert "not quantized, and the configuration does not exclude it" in made.finding(
        "exclude", f"{K0}.weight"
    )


def test_incomplete_exclude_list(write: Callable[..., Written]) -> None:
    """Old ModelOpt files omit modules: a warning. A loader of compressed-tensors would fail: a fault."""
    made = write("modelopt-fp8")
    made.said["exclude_modules"] = []
    made.finding("exclude", "lm_head.weight", warning=True)
    made = write("ct-fp8")
    made.said["ignore"] = []
    made.finding("exclude", "lm_head.weight")


# Scales stored as their inverse, for FP8, NVFP4 (ModelOpt and compressed-tensors) and integers


@pytest.mark.parametrize(
    ("layout", "last"),
    [
        ("modelopt-fp8", "weight_scale"),
        ("ct-fp8-dynamic", "weight_scale"),
        ("deepseek", "weight_scale_inv"),
        ("modelopt-nvfp4", "weight_scale_2"),
        ("ct-nvfp4", "weight_global_scale"),
        ("modelopt-awq", "weight_scale"),
        ("ct-int4", "weight_scale"),
        ("ct-int8", "weight_scale"),
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_inverse_scales(write: Callable[..., Written], layout: str, last: str, everywhere: bool) -> None:
    made = write(layout)
    names = [name for name in made.tensors if name.endswith(f".{last}")]
    for name in names if everywhere else [f"{GATE0}.{last}"]:
        made.tensors[name] = (1 / made.tensors[name].astype(np.float32)).astype(made.tensors[name].dtype)
    found = [one for one in made.findings() if one.kind != "fused"]
    assert len(found) == (14 if everywhere else 1)
    for one in found:
        assert (one.kind, one.warning) == ("magnitude", False)
        assert "is its scale stored as the inverse?" in one.what
    if not everywhere:
        assert found[0].tensor.startswith(GATE0)


@pytest.mark.parametrize("rms", [0.002, 0.02, 0.5])
@pytest.mark.parametrize("layout", ["modelopt-fp8", "modelopt-nvfp4", "ct-nvfp4", "ct-int4", "deepseek"])
def test_inverse_scales_of_large_and_small_weights(tmp_path: Path, layout: str, rms: float) -> None:
    """Only inverse scales give a finding, one for each module. Outliers are 50 times the rms."""
    quantizer, settings, _ = LAYOUTS[layout]

    def scaled(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        w = w * np.float32(rms / w.std())
        w[1, 1] = 50 * rms
        return quantizer(w)

    made = assemble(tmp_path / layout, dict.fromkeys(weights(), scaled), settings)
    assert [one for one in made.findings() if one.kind != "fused"] == []
    for name, value in made.tensors.items():
        if name.endswith(("weight_scale_2", "weight_global_scale", "weight_scale_inv")) or (
            name.endswith("weight_scale") and value.dtype != E4M3
        ):
            made.tensors[name] = (1 / value.astype(np.float32)).astype(value.dtype)
    found = [one for one in made.findings() if one.kind != "fused"]
    assert len(found) == 14
    assert {one.kind for one in found} == {"magnitude"}


def test_outlier_among_similar_modules(tmp_path: Path) -> None:
    """A scale of small weights that is 1000 times too large is plausible alone, but not beside the others."""
    made = assemble(
        tmp_path / "small", dict.fromkeys(weights(), lambda w: fp8(w * np.float32(0.03))), modelopt("FP8")
    )
    made.tensors[f"{GATE0}.weight_scale"] *= np.float32(1000)
    assert re.search(
        r"are about 2\.\d+ and those of similar modules 0\.002", made.finding("magnitude", f"{GATE0}.weight")
    )


@pytest.mark.parametrize(
    ("layout", "last"), [("modelopt-nvfp4", "input_scale"), ("ct-nvfp4", "input_global_scale")]
)
def test_inverse_input_scales(write: Callable[..., Written], layout: str, last: str) -> None:
    made = write(layout)
    for name in made.tensors:
        if name.endswith(f".{last}"):
            made.tensors[name] = 1 / made.tensors[name]
    assert "as 14 of 14 input scales do: are they stored as the inverse?" in made.finding(
        "magnitude", f"{Q0}.{last}"
    )


def test_dead_layers_are_a_warning(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    made.tensors[f"{K0}.weight"][:] = 0
    assert made.finding("magnitude", f"{K0}.weight", warning=True) == "all sampled values are zero"


def test_fused_layers_with_different_scales(write: Callable[..., Written]) -> None:
    made = write("modelopt-nvfp4", share=False)
    found = made.findings()
    assert {one.kind for one in found} == {"fused"}
    assert all(one.warning for one in found)
    assert [one.tensor for one in found] == [
        f"model.layers.{layer}.{end}.weight_scale_2"
        for layer in (0, 1)
        for end in ("self_attn.q_proj", "mlp.gate_proj")
    ]
    assert found[0].what.startswith("differs among q_proj, k_proj, v_proj: ")


def test_unclaimed_tensors(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    made.tensors[f"{K0}.weight_scale_3"] = f32(1)
    made.finding("unclaimed", f"{K0}.weight_scale_3")
    del made.tensors[f"{K0}.weight_scale_3"]
    made.tensors["model.norm.input_scale"] = f32(1)
    made.finding("unclaimed", "model.norm.input_scale")
    del made.tensors["model.norm.input_scale"]
    made.tensors["model.blob"] = np.zeros(4, np.uint8)
    assert made.finding("unclaimed", "model.blob") == "U8 [4] belongs to no weight"
    del made.tensors["model.blob"]
    made.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    made.tensors["model.layers.0.mlp.router.scale"] = np.ones(8, np.float32)  # a parameter of the model
    assert made.findings() == []


def test_config_and_tensors_disagree_on_quantization(write: Callable[..., Written]) -> None:
    made = write("ct-fp8")
    settings = made.config.pop("quantization_config")
    assert "does not declare quantization" in made.finding("config", "config.json")
    plain = {name: value for name, value in made.tensors.items() if "proj" not in name}
    plain |= {f"{name}.weight": value.astype(BF16) for name, value in made.exact.items()}
    made.tensors = plain
    report = check_checkpoint(made.write())
    assert (report.quantization, report.findings) == ("", ())
    made.config["quantization_config"] = settings
    assert "but no tensor is quantized" in made.finding("config", "config.json")
    made.config["quantization_config"] = settings | {"quantization_status": "calibration"}
    assert "'calibration'" in made.findings()[0].what


def test_kv_scales(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    made.said["kv_cache_quant_algo"] = "FP8"
    assert "1.0 is used" in made.finding("missing", "config.json", warning=True)
    name = "model.layers.0.self_attn.k_proj.k_scale"
    made.tensors[name] = f32(0)
    assert made.finding("value", name) == "1 zero of 1 values"


# Files


def test_lfs_pointers_and_truncated_files(write: Callable[..., Written]) -> None:
    made = write("modelopt-fp8")
    file = made.write() / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"truncated: tensor .* ends \d+ bytes after the file does"):
        check_checkpoint(made.root)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    file.write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a git-LFS pointer"):
        check_checkpoint(made.root)
    file.write_bytes(data)
    (made.root / "hf_quant_config.json").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json is a git-LFS pointer"):
        check_checkpoint(made.root)
    (made.root / "hf_quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        check_checkpoint(made.root)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with 'gptq'"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "'MXFP8'"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mxfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": float_args(4, "group", group_size=32)}},
            },
            "4-bit float, group, mxfp4-pack-quantized",
        ),
    ],
)
def test_unsupported_formats_are_refused(
    write: Callable[..., Written], settings: dict[str, Any], what: str
) -> None:
    made = write("ct-fp8")
    made.config["quantization_config"] = settings
    with pytest.raises(UnsupportedError, match=what) as caught:
        check_checkpoint(made.write())
    assert "known: " in caught.value.hint


@pytest.mark.parametrize(
    ("entry", "matching", "other"),
    [
        ("lm_head", "lm_head", "model.lm_head2"),
        ("lm_head", "language_model.lm_head", "lm_heads"),
        ("model.layers.0", "model.layers.0.mlp.gate", "model.layers.01.mlp.gate"),
        ("model.layers.1*", "model.layers.12.mlp.gate", "model.layers.2.mlp.gate"),
        ("*gate", "model.layers.12.mlp.gate", "model.layers.12.mlp.gate_proj"),
        ("re:.*lm_head", "model.lm_head", "lm_hea"),
        (r"re:model\.visual\..*", "model.visual.blocks.0", "model.layers.0"),
        ("re:(", "nothing", "("),
    ],
)
def test_exclude_patterns(entry: str, matching: str, other: str) -> None:
    assert matches(matching, [entry]) is (entry != "re:(")
    assert not matches(other, [entry])


@pytest.mark.parametrize(
    "layout", ["modelopt-nvfp4", "ct-nvfp4", "ct-int4-asymmetric", "ct-int4-reordered", "deepseek"]
)
def test_malformed_input_gives_findings_or_an_llmc_error(write: Callable[..., Written], layout: str) -> None:
    """Tensors of random shapes and dtypes, and settings of random types, cause no traceback."""
    made = write(layout)
    draw = np.random.default_rng(11)
    made.tensors = {name: value for name, value in made.tensors.items() if "layers.1" not in name}
    sound, config = dict(made.tensors), json.dumps([made.config, made.hf_quant])
    mine = [name for name in sound if name.startswith((Q0, K0))]
    shapes = [(), (0,), (1,), (192,), (2, 3), (0, 4), (64, 192), (1, 1), (2, 1, 3, 1)]
    odd = [None, 0, -1, "x", [], {}, [1, "x"], {"a": 1}, True, 1e9]
    for _ in range(60):
        name = mine[draw.integers(len(mine))]
        dtype = [np.uint8, np.int32, np.int64, np.float32, E4M3, BF16, np.float64][draw.integers(7)]
        value = draw.integers(-3, 300, shapes[draw.integers(len(shapes))]).astype(dtype)
        made.tensors = sound | {name: value}
        made.findings()
    made.tensors = sound
    for _ in range(60):
        made.config, made.hf_quant = json.loads(config)
        at: Any = made.said
        while True:
            key = draw.choice(list(at)) if isinstance(at, dict) else int(draw.integers(len(at)))
            if not at[key] or not isinstance(at[key], dict | list) or draw.random() < 0.3:
                break
            at = at[key]
        at[key] = odd[draw.integers(len(odd))]
        with contextlib.suppress(LlmcError):
            made.findings()
