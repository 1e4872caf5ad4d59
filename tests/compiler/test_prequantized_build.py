"""`llmc build` of pre-quantized checkpoints: the engine computes with the dequantized weights."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.cli import main
from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.prequantized.dequantize import dequantize
from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint, read_quantized
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.driver import BuildInputs, compile_model, make_weights, plan_build
from llmc.compiler.progress import Clock, Silent
from llmc.compiler.quantize import prequantized_arrays
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.tensorrt import build as tensorrt_build
from llmc.compiler.targets.tensorrt import target
from llmc.compiler.trace import export
from llmc.compiler.verify.figures import recorded
from llmc.compiler.weights.write import write_weights
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.finalize import serialize
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions
from llmc.runtime.backends.onnxruntime import OnnxRuntimeBackend
from llmc.runtime.backends.openvino.backend import OpenVinoBackend
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import UnsupportedError
from llmc.runtime.load import load_engine
from support.packed_weights import read_packed
from support.passes import oracle_graph
from support.quantized_layouts import (
    BF16,
    CONFIG,
    K0,
    LAYOUTS,
    Q0,
    Quantizer,
    Written,
    assemble,
    f32,
    fp8,
    modelopt,
    nvfp4,
    weights,
)
from support.traces import copy_of

LONG = [np.random.default_rng(5).integers(0, 96, 45)]  # crosses a block of the cache
SHORT = [np.random.default_rng(seed).integers(0, 96, 8) for seed in range(5)]
Sequences = Sequence[np.ndarray]
BUILDABLE = [layout for layout in LAYOUTS if layout not in ("ct-int4-reordered", "ct-int8-asymmetric")]
needs_tensorrt = pytest.mark.skipif(
    not tensorrt_build.is_installed(target.RTX.library), reason="the package tensorrt-rtx is not installed"
)


@pytest.fixture(autouse=True)
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the graph once for all layouts, because it depends on the architecture alone."""
    monkeypatch.setattr(export, "trace", _trace)


_real_trace = export.trace


def _trace(config: Any, dtype: str, max_seq_len: int) -> export.Trace:
    assert not hasattr(config, "quantization_config")
    return copy_of(_traced(config.model_type, dtype, max_seq_len))


@functools.cache
def _traced(model_type: str, dtype: str, max_seq_len: int) -> export.Trace:
    return _real_trace(AutoConfig.for_model(model_type, **CONFIG), dtype, max_seq_len)


def complete(made: Written, model_type: str = "llama") -> Written:
    """Write the tensors of `made` as a checkpoint of an architecture that transformers supports."""
    made.config |= CONFIG | {"model_type": model_type}
    made.tensors["model.embed_tokens.weight"] = (
        made.tensors["model.embed_tokens.weight"] * BF16(0.5)
    ).astype(BF16)
    if model_type == "qwen3":
        for layer in (0, 1):
            for norm in ("q_norm", "k_norm"):
                name = f"model.layers.{layer}.self_attn.{norm}.weight"
                made.tensors[name] = np.linspace(0.5, 1.5, 32).astype(BF16)
    if "pre_quant_scale" in {name.rpartition(".")[2] for name in made.tensors}:
        factors = np.linspace(0.5, 2, 320).astype(BF16)
        for name, value in made.tensors.items():
            if name.endswith("pre_quant_scale"):
                made.tensors[name] = factors[: value.size].astype(value.dtype)
    return made


def checkpoint(root: Path, layout: str, share: bool = True, model_type: str = "llama") -> Written:
    quantizer, settings, _ = LAYOUTS[layout]
    return complete(assemble(root / layout, dict.fromkeys(weights(), quantizer), settings, share), model_type)


def build(made: Written, output: Path, **options: Any) -> Manifest:
    request = BuildRequest(str(made.write()), output, verify=False, **options)
    return compile_model(request).manifest


def rounded(x: np.ndarray, module: Any) -> np.ndarray:
    """Return the input of a layer after the recipe's activation quantization, if its scale is static."""
    tensors = {
        role: ref.read().astype(np.float64).reshape(-1)
        for role, ref in module.tensors.items()
        if "scale" in role
    }
    if "pre_quant_scale" in tensors:
        x = x * tensors["pre_quant_scale"].astype(np.float32)
    step = tensors.get(
        "input_scale", 1 / tensors["inverse_input_scale"] if "inverse_input_scale" in tensors else None
    )
    if step is None or module.format not in ("fp8", "nvfp4"):
        return x
    scale = np.float32(step[0])
    if module.format == "fp8":
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    block_scale = np.minimum(amax / np.float32(6) / scale, 448).astype(ml_dtypes.float8_e4m3fn)
    wide = block_scale.astype(np.float32) * scale
    codes = np.clip(blocks / np.where(wide > 0, wide, 1), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (codes.astype(np.float32) * wide).reshape(x.shape)


def reference(made: Written, sequences: Sequences) -> list[np.ndarray]:
    """Return transformers' fp32 logits with dequantized weights and static activation quantization."""
    quantized: QuantizedCheckpoint = read_quantized(Checkpoint.open(made.root))
    config = {key: value for key, value in made.config.items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = {name: ref.read().astype(np.float32) for name, ref in quantized.plain.items()}
    state |= {f"{name}.weight": dequantize(module) for name, module in quantized.modules.items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    for name, module in quantized.modules.items():

        def hook(layer: Any, args: Any, module: Any = module) -> Any:
            return (torch.from_numpy(rounded(args[0].numpy(), module)),)

        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        return [model(input_ids=torch.tensor(ids[None])).logits[0].numpy() for ids in sequences]


def logits(backend: Backend, ids: np.ndarray) -> np.ndarray:
    """Return the logits of one step, [len, 96]."""

    step = Batch.pack([(ids, 0, [2, 0], range(len(ids)))])
    return backend.forward(step).copy()


def errors(made: Written, bundle: Path, sequences: Sequences) -> list[float]:
    """Return the largest error of each sequence's logits, relative to the largest logit, or to 10."""
    backend = load_backend(EngineFile.of(Bundle.open(bundle)), LoadOptions(kv_blocks=4))
    return [
        float(np.abs(logits(backend, ids) - expected).max() / max(1, np.abs(expected).max() / 10))
        for ids, expected in zip(sequences, reference(made, sequences), strict=True)
    ]


def assert_equal(made: Written, bundle: Path, rounds_inputs: bool) -> None:
    """Check that most sequences are exact.

    With activation quantization, about one input in 100,000 lies so near a tie that it is rounded to the
    other side, and the rest of its sequence differs.
    """
    found = errors(made, bundle, SHORT if rounds_inputs else LONG)
    assert sum(one < 1e-4 for one in found) > len(found) / 2, found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", BUILDABLE)
def test_every_layout_equals_the_dequantized_model(layout: str, model_type: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, layout, model_type=model_type)
    manifest = build(made, tmp_path / "x.llmc")
    static = layout in ("modelopt-fp8", "ct-fp8") or "nvfp4" in layout
    assert manifest.target.engine == "native"
    assert manifest.quantization is not None
    assert manifest.quantization["modules"] == 14
    listed = " (in its list of exceptions)" if layout != "deepseek" else ""
    assert manifest.quantization["kept"] == {"lm_head": f"not quantized in the checkpoint{listed}"}
    assert {one.name: one.matches for one in manifest.passes}["fuse-linears"] == 4
    assert_equal(made, tmp_path / "x.llmc", static)
    build(made, tmp_path / "onnx.llmc", engine="onnxruntime" if static else "openvino")
    assert_equal(made, tmp_path / "onnx.llmc", static)


@pytest.mark.slow
def test_layers_with_different_global_scales_are_not_fused(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "modelopt-nvfp4", share=False)
    manifest = build(made, tmp_path / "x.llmc")
    [fuse] = [one for one in manifest.passes if one.name == "fuse-linears"]
    assert (fuse.matches, fuse.near_misses) == (0, 4)
    names = read_header(tmp_path / "x.llmc/weights/packed.safetensors").keys()
    assert f"{Q0}.weight" in names
    assert not any("|" in name for name in names)
    assert_equal(made, tmp_path / "x.llmc", True)


@pytest.mark.slow
def test_per_tensor_fp8_layers_fuse_to_per_channel_fp8(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "modelopt-fp8", share=False)
    manifest = build(made, tmp_path / "x.llmc")
    assert manifest.quantization is not None
    assert manifest.quantization["formats"] == {"fp8-per-channel": 10, "fp8": 4}
    assert_equal(made, tmp_path / "x.llmc", True)


@pytest.mark.slow
def test_mixed_formats_and_unquantized_layers(tmp_path: Path) -> None:
    """k_proj is unquantized and not fused, the rest of attention is FP8, the MLPs are NVFP4."""

    def quantizer(name: str) -> Quantizer:
        if name.endswith("k_proj"):
            return lambda w: ({"weight": w.astype(BF16)}, w)
        return fp8 if "self_attn" in name else nvfp4()

    layers = {
        name: {"quant_algo": "FP8" if "self_attn" in name else "NVFP4"}
        for name in weights()
        if "k_proj" not in name
    }
    settings = modelopt("MIXED_PRECISION", quantized_layers=layers, exclude_modules=["lm_head", "*.k_proj"])
    made = complete(assemble(tmp_path / "m", {name: quantizer(name) for name in weights()}, settings))
    manifest = build(made, tmp_path / "x.llmc")
    assert manifest.quantization is not None
    assert manifest.quantization["formats"] == {"fp8": 6, "nvfp4": 6}
    assert f"{K0}" in manifest.quantization["kept"]
    assert_equal(made, tmp_path / "x.llmc", True)


def test_weights_file_has_the_checkpoints_codes(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "ct-fp8-dynamic")
    parts = [f"model.layers.0.self_attn.{one}_proj" for one in "qkv"]
    expected = {
        last: np.concatenate([made.tensors[f"{part}.{last}"].reshape(-1) for part in parts])
        for last in ("weight", "weight_scale")
    }
    build(made, tmp_path / "native.llmc")
    packed, _ = read_packed(tmp_path / "native.llmc")
    fused = packed["|".join(f"{part}.weight" for part in parts)]
    assert fused.scales is not None
    assert fused.values.tobytes() == expected["weight"].tobytes()
    assert np.array_equal(fused.scales.reshape(-1), expected["weight_scale"].astype(np.float32))
    assert packed["lm_head.weight"].element == "bf16"
    assert np.array_equal(packed["lm_head.weight"].values, made.tensors["lm_head.weight"])

    build(made, tmp_path / "x.llmc", engine="openvino")
    written = read_header(tmp_path / "x.llmc/weights/model.safetensors")
    for last, array in expected.items():
        stored = written["|".join(f"{part}.{last}" for part in parts)]
        assert stored.read().tobytes() == array.tobytes()
    assert written["lm_head.weight"].dtype == "F16"  # bf16 times a power of two
    backend = OpenVinoBackend(tmp_path / "x.llmc/rank0.onnx", 4)
    inside = backend._request.get_compiled_model().get_runtime_model().get_ops()
    kinds = [
        node.get_output_element_type(0).get_type_name()
        for node in inside
        if node.get_rt_info()["layerType"].astype(str) == "Const"
    ]
    assert kinds.count("f8e4m3") == 2 * 4  # compressed in memory too


@pytest.mark.parametrize("layout", ["modelopt-awq", "ct-int4-asymmetric", "ct-int4-channel"])
def test_fast_quantizes_the_inputs_of_integer_weights(tmp_path: Path, layout: str) -> None:
    """Blocks of 64 in 4 and in 8 bits, and one scale per row."""
    build(checkpoint(tmp_path, layout), tmp_path / "x.llmc")
    engines = [load_engine(tmp_path / "x.llmc", kv_memory=1 << 20, fast=fast) for fast in (False, True)]
    exact, fast = (logits(engine.backend, LONG[0]) for engine in engines)
    error = np.abs(fast - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1


def test_quantization_loss_is_relative_to_the_dequantized_weights(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "modelopt-fp8")
    manifest = compile_model(BuildRequest(str(made.write()), tmp_path / "x.llmc")).manifest
    assert manifest.verification.details["quantization_loss"]["reference"] == "dequantized"
    assert recorded(manifest).against == "the dequantized checkpoint"


def test_dry_run_shows_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint(tmp_path, "ct-fp8-dynamic").write()
    output = tmp_path / "x.llmc"
    assert main.main(["build", str(root), "-o", str(output), "--dry-run"]) == 0
    out = capsys.readouterr().out
    [row] = [line.split() for line in out.splitlines() if line.startswith("model.layers.0-1.mlp.down_proj")]
    assert row[1:] == ["192", "x", "320", "8.05", "fp8-per-channel-weight-only"]
    assert "14 of 15 matrices in fp8-per-channel-weight-only" in out
    assert "codes and scales of the checkpoint: compressed-tensors float-quantized" in out
    assert "inputs, fp8 in the recipe, are not quantized (14 modules)" in out
    assert main.main(["build", str(root), "-o", str(output), "--dry-run", "--quant", "int8"]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert not output.exists()


# TensorRT: built for GPUs, and the same graph computed on the CPU


def test_enterprise_target_checks_formats_for_the_local_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_build, "is_installed", lambda library: True)
    monkeypatch.setattr(target.TensorRTTarget, "legalize", lambda *args: ())
    monkeypatch.setattr(target, "version", lambda package: "1.0")
    root = checkpoint(tmp_path, "modelopt-nvfp4").write()
    request = BuildRequest(str(root), tmp_path / "x.llmc", target="tensorrt")
    monkeypatch.setattr(target, "_this_gpu", lambda wanted: (100,))
    plan, _ = plan_build(request)
    assert plan.quantization is not None
    assert plan.quantization.record()["formats"] == {"nvfp4": 14}
    monkeypatch.setattr(target, "_this_gpu", lambda wanted: (90,))
    with pytest.raises(UnsupportedError, match=r"is nvfp4, which needs SM100 or newer, but .* SM90"):
        plan_build(request)


def graph_for_tensorrt(made: Written, directory: Path, dtype: str, sm: int) -> BuildInputs:
    """Write TensorRT's graph and its weights to `directory`."""
    options: Any = {"target": "tensorrt-rtx", "dtype": dtype, "sms": (sm,)}
    request = BuildRequest(str(made.write()), directory / "unused.llmc", verify=False, **options)
    _, inputs = plan_build(request)
    assert inputs.prequantized is not None
    tensors = prequantized_arrays.produce_prequantized(
        inputs.matrices, inputs.prequantized.modules, directory
    ).tensors
    with BundleWriter(directory / "graph.llmc") as writer:
        write_weights(inputs.model, inputs.checkpoint.tensors, writer, made=tensors)
        writer.path("rank0.onnx").write_bytes(to_tensorrt(inputs.model).SerializeToString())
        shutil.copytree(writer.path("rank0.onnx").parent, directory / "graph")
    return inputs


KV_ONLY = {
    "modelopt": modelopt(None, kv_cache_quant_algo="FP8", exclude_modules=[]),
    "compressed-tensors": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False},
        }
    },
}


@pytest.mark.parametrize("method", KV_ONLY)
def test_checkpoint_with_only_kv_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The weights are unquantized, and an FP8 cache has the checkpoint's scales."""

    def plain(w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {"weight": w.astype(BF16)}, w

    made = complete(assemble(tmp_path / "m", dict.fromkeys(weights(), plain), KV_ONLY[method]))
    made.tensors |= {f"{K0}.k_scale": f32(0.5), f"{K0.replace('k_proj', 'v_proj')}.v_scale": f32(0.25)}
    assert build(made, tmp_path / "x.llmc").quantization is None
    assert_equal(made, tmp_path / "x.llmc", False)
    monkeypatch.setattr(tensorrt_build, "is_installed", lambda library: True)
    monkeypatch.setattr(target.TensorRTTarget, "legalize", lambda *args: ())
    monkeypatch.setattr(target, "version", lambda package: "1.0")
    options: Any = {"target": "tensorrt-rtx", "kv_dtype": "fp8"}
    plan, inputs = plan_build(BuildRequest(str(made.root), tmp_path / "y.llmc", **options))
    with BundleWriter(tmp_path / "y.llmc") as writer:
        make_weights(plan, inputs, writer, Clock(Silent()), inputs.checkpoint.file_hashes())
    nodes = attention_nodes(inputs.model)
    scales = [[node.attributes[f"{one}_scale"].as_float() for one in ("key", "value")] for node in nodes]
    assert scales == [[0.5, 0.25], [1.0, 1.0]]


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "sm"),
    [
        ("modelopt-fp8", 89),
        ("modelopt-fp8-channel", 89),
        ("ct-fp8-dynamic", 89),
        ("deepseek", 89),
        ("modelopt-awq", 89),
        ("ct-int4", 86),
        ("ct-int4-asymmetric", 86),
        ("modelopt-int8", 86),
        ("modelopt-nvfp4", 120),
        ("modelopt-nvfp4-awq", 120),
        ("ct-nvfp4", 120),
    ],
)
def test_tensorrt_graph_of_every_layout_is_accurate_to_16_bits(layout: str, sm: int, tmp_path: Path) -> None:
    """Layouts with activation quantization are only built, because 16-bit rounding changes their codes.

    tests/passes/test_prequantized_linears.py compares them.
    """
    made = checkpoint(tmp_path, layout)
    inputs = graph_for_tensorrt(made, tmp_path, "bf16", sm)
    oracle = tmp_path / "graph/oracle.onnx"
    oracle.write_bytes(serialize(oracle_graph(moved(inputs.model, tmp_path / "graph"), "bf16")))
    if not any(matrix.format.activations for matrix in inputs.matrices):
        [expected] = reference(made, LONG)
        got = logits(OnnxRuntimeBackend(oracle, 4), LONG[0])
        assert np.sqrt(np.mean((got - expected) ** 2)) < 0.02 * np.sqrt(np.mean(expected**2))
    limits = tensorrt_build.EngineLimits(128, 64, 4, 8)
    job = tensorrt_build.EngineJob(
        target.RTX.library, str(tmp_path / "graph/rank0.onnx"), str(tmp_path / "x.plan"),
        tensorrt_build.profile(inputs.model, limits), (sm,),
    )  # fmt: skip
    assert tensorrt_build.build(job, Silent()).attention_layers == 2


@needs_tensorrt
@pytest.mark.slow
def test_fused_per_tensor_fp8_builds_for_tensorrt(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "modelopt-fp8", share=False)
    inputs = graph_for_tensorrt(made, tmp_path, "fp16", 89)
    limits = tensorrt_build.EngineLimits(128, 64, 4, 8)
    job = tensorrt_build.EngineJob(
        target.RTX.library, str(tmp_path / "graph/rank0.onnx"), str(tmp_path / "x.plan"),
        tensorrt_build.profile(inputs.model, limits), (89,),
    )  # fmt: skip
    assert tensorrt_build.build(job, Silent()).attention_layers == 2


def moved(model: ir.Model, directory: Path) -> ir.Model:
    """Return `model` with its weights in the directory that the graph was copied to."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = directory
    return model
