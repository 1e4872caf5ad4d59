"""KV caches that hold less than the engine computes in: FP8 on GPUs, int8 on the CPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from llmc.cli import main
from llmc.compiler import zoo
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.progress import Silent
from llmc.compiler.request import TARGETS, BuildRequest, cache_dtype
from llmc.compiler.targets.tensorrt import build
from llmc.compiler.trace.export import trace
from llmc.compiler.verify.judge import judge
from llmc.compiler.verify.kv_cache_loss import kv_cache_loss
from llmc.passes import contract
from llmc.passes.geometry import attention_nodes, read_geometry
from llmc.passes.legalize.finalize import serialize
from llmc.passes.pipeline import canonicalize
from llmc.plugins.cuda.gpus import SMS
from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES, QuantizedCache
from llmc.plugins.paged_attention.tensorrt_plugin import Attributes, make_plugin
from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.backends.onnxruntime import OnnxRuntimeBackend
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, BundleError, UnsupportedError
from llmc.runtime.installation import upgrade_hint
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams
from support.fast_builds import fast_builds
from support.passes import lower_for_tensorrt, oracle_graph, set_kv_scales

needs_tensorrt = pytest.mark.skipif(
    not build.is_installed("tensorrt_rtx"), reason="the package tensorrt-rtx is not installed"
)
FP8, BF16, FP32 = ir.DataType.FLOAT8E4M3FN, ir.DataType.BFLOAT16, ir.DataType.FLOAT


@pytest.fixture(scope="module")
def canonical() -> ir.Model:
    config = dict(zoo.zoo_config("llama-tiny"))
    model = trace(AutoConfig.for_model(config.pop("model_type"), **config), "bf16", 256).model
    contract.run(model, canonicalize())
    return model


# The graph.


def test_scales_are_the_largest_magnitude_over_448(canonical: ir.Model) -> None:
    """As ModelOpt writes k_scale and v_scale; 1.0 where nothing is known."""
    model = canonical.clone()
    set_kv_scales(model, {0: (13.44, 0.0)})
    found = [
        [node.attributes[name].as_float() for name in ("key_scale", "value_scale")]
        for node in attention_nodes(model)
    ]
    assert found == [[np.float32(0.03), 1.0], [1.0, 1.0]]
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if "_cache" in str(v.name)]
    assert len(caches) == 8
    assert {value.dtype for value in caches} == {FP8}
    assert {v.dtype for v in canonical.graph.inputs if "_cache" in str(v.name)} == {BF16}
    assert read_geometry(model) == read_geometry(canonical)


def test_scales_may_come_once_the_graph_is_lowered(canonical: ir.Model) -> None:
    early, late = canonical.clone(), canonical.clone()
    set_kv_scales(early, {0: (3.0, 2.0), 1: (4.0, 5.0)})
    set_kv_scales(late, {})
    for model in (early, late):
        lower_for_tensorrt(model, "bf16")
    assert serialize(early) != serialize(late)
    set_kv_scales(late, {0: (3.0, 2.0), 1: (4.0, 5.0)})
    assert serialize(early) == serialize(late)


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        ({2: (1.0, 1.0)}, "KV scales for layer 2 of a model with 2 layers"),
        ({1: (float("nan"), 1.0)}, r"the largest magnitude of keys of model\.layers\.1\.self_attn is nan"),
        ({0: (1.0, -2.0)}, r"the largest magnitude of values of model\.layers\.0\.self_attn is -2\.0"),
    ],
)
def test_scales_that_cannot_be(
    largest: dict[int, tuple[float, float]], message: str, canonical: ir.Model
) -> None:
    with pytest.raises(BuildError, match=message) as error:
        set_kv_scales(canonical.clone(), largest)
    assert error.value.hint


def test_the_oracle_rounds_what_enters_the_cache_or_leaves_it(canonical: ir.Model) -> None:
    plain, lowered = canonical.clone(), canonical.clone()
    set_kv_scales(lowered, {0: (3.0, 2.0), 1: (4.0, 5.0)})
    for model in (plain, lowered):
        lower_for_tensorrt(model, "bf16")
    rounded = oracle_graph(lowered, "bf16")
    assert {v.dtype for v in lowered.graph.inputs if "_cache" in str(v.name)} == {FP8}  # a clone was changed
    for node in attention_nodes(rounded):
        assert not {"key_scale", "value_scale"} & node.attributes.keys()
        for index in (1, 2):
            assert [op for op, _ in zip(ancestors(node, index), range(5), strict=False)] == [
                "Mul", "Cast", "Cast", "Div", "Cast",
            ]  # fmt: skip
    exact = oracle_graph(lowered, "bf16", round_cache=False)
    assert described(exact) == described(oracle_graph(plain, "bf16"))


def ancestors(node: ir.Node, index: int) -> Any:
    """Operators before an input of a node, along first inputs."""
    producer = node.inputs[index].producer()  # type: ignore[union-attr]
    while producer is not None:
        yield producer.op_type
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None


def described(model: ir.Model) -> list[Any]:
    nodes = [
        (n.op_type, [v and (v.name, v.dtype) for v in n.inputs], sorted(n.attributes)) for n in model.graph
    ]
    return [nodes, [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]]


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-tiny"])
def test_the_oracle_is_transformers_with_a_rounded_cache(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In fp32, where nothing else rounds: transformers whose cache torch rounds to E4M3, layer by layer."""
    largest = {0: (100.0, 0.5), 1: (0.75, 100.0)}  # those of 100 do not saturate, the others do

    class Rounding(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *more: Any, **named: Any) -> Any:
            scales = [np.float32(amax / 448) for amax in largest[layer_idx]]
            saturated.extend(
                bool((x.abs() > 448 * s).any())
                for x, s in zip((key_states, value_states), scales, strict=True)
            )
            rounded = [
                (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                for x, s in zip((key_states, value_states), scales, strict=True)
            ]
            return super().update(*rounded, layer_idx, *more, **named)

    saturated: list[bool] = []
    opened = Checkpoint.open(checkpoint(name))
    reference = AutoModelForCausalLM.from_pretrained(
        opened.path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.random.default_rng(0).integers(0, 384, 50)
    with torch.no_grad():
        plain, wanted = (
            reference(input_ids=torch.tensor(ids[None]), past_key_values=cache, use_cache=True)
            .logits[0]
            .numpy()
            for cache in (DynamicCache(), Rounding())
        )
    assert any(saturated)
    assert not all(saturated)

    model = trace(load_config(opened), "fp32", 256).model
    contract.run(model, canonicalize())
    set_kv_scales(model, largest)
    lower_for_tensorrt(model, "fp32")
    for value in model.graph.initializers.values():
        if value.const_value is None:
            parts = [opened.tensors[part].read() for part in str(value.name).split("|")]
            value.const_value = ir.tensor(np.concatenate(parts).astype(np.float32), name=value.name)
    (tmp_path / "oracle.onnx").write_bytes(serialize(oracle_graph(model, "fp32")))
    backend = OnnxRuntimeBackend(tmp_path / "oracle.onnx", 2)
    rows = []
    for first, last in ((0, 35), (35, 49), (49, 50)):
        step = Batch.pack(
            [(ids[first:last].tolist(), first, [1, 0] if last > 32 else [0], range(last - first))]
        )
        rows.append(backend.forward(step).copy())
    error = np.abs(np.concatenate(rows) - wanted).max(1)
    lost = np.abs(plain - wanted).max(1)
    assert np.median(error) < 1e-4
    assert (error > 0.1 * lost).mean() < 0.1  # a key at the edge between two codes may take the other one


def test_the_loss_is_that_of_the_cache_alone() -> None:
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((length, 11)).astype(np.float32) for length in (5, 3)]
    same = kv_cache_loss(exact, exact, "fp8")
    assert same == {
        "kv_dtype": "fp8", "positions": 8, "max_logit_error": 0, "rms_logit_error": 0, "mean_kl": 0,
        "top1_agreement_without_ties": 1,
    }  # fmt: skip
    other = [rows + np.float32(0.5) * (np.arange(11) == 4) for rows in exact]
    p, q = (np.exp(np.concatenate(x).astype(np.float64)) for x in (exact, other))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    loss = kv_cache_loss(exact, other, "fp8")
    assert loss["mean_kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=0.05)  # two digits
    assert loss["max_logit_error"] == 0.5
    assert loss["top1_agreement_without_ties"] == (p.argmax(1) == q.argmax(1)).mean()


# The table.


@pytest.mark.parametrize("cache", QUANTIZED_CACHES.values(), ids=QUANTIZED_CACHES)
def test_every_quantized_cache_has_a_target_and_kernels(cache: QuantizedCache) -> None:
    assert ir.DataType[cache.onnx].bitwidth == 8
    codes = np.arange(256, dtype=np.uint8).view(ir.DataType[cache.onnx].numpy()).astype(np.float32)
    assert cache.largest == np.nanmax(codes)
    assert any(cache.name in options.caches.values() for options in TARGETS.values())
    attention = launch.Attention(4, 2, 64, 64)
    for kernel in ("write_kv", "prefill", "decode"):
        variant = launch.variant(kernel, attention, "bf16", cache.name)
        assert f"-{cache.name}kv-" in str(variant)
        assert launch.signature(variant)["key_cache"] == "*u8"
        for sm in SMS:
            assert launch.configure(variant, sm).constants["FP8"] > 0


@needs_tensorrt
def test_tensorrt_has_every_quantized_cache() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    for cache in QUANTIZED_CACHES.values():
        assert hasattr(trt.DataType, cache.tensorrt)


# The plugin.

GIVEN = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.5, "window": 0, "softcap": 0.0}


def test_engines_of_before_have_no_scales_and_mean_one() -> None:
    old = Attributes.read(GIVEN)
    assert (old.key_scale, old.value_scale) == (1.0, 1.0)
    assert old.stored() == GIVEN
    new = Attributes.read(GIVEN | {"key_scale": 0.5, "value_scale": 1.0})
    assert new.stored() == GIVEN | {"key_scale": 0.5}
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            Attributes.read(GIVEN | {"value_scale": wrong})


@needs_tensorrt
def test_caches_are_fp8_together_or_have_the_models_dtype() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    given = trt.PluginFieldCollection([])
    arrays = {n: np.array([v], np.int32 if isinstance(v, int) else np.float32) for n, v in GIVEN.items()}
    arrays["key_scale"] = np.array([0.25], np.float32)
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
    for name, array in arrays.items():
        given.append(trt.PluginField(name, array, kinds[array.dtype]))
    creator = make_plugin(trt)
    plugin = creator.create_plugin("p", given, trt.TensorRTPhase.BUILD)
    stored = {field.name: np.asarray(field.data).item() for field in plugin.get_fields_to_serialize()}
    assert stored == GIVEN | {"key_scale": 0.25}

    kind, linear = trt.DataType, trt.TensorFormat.LINEAR

    def takes(model: Any, keys: Any, values: Any, keys_out: Any, values_out: Any) -> bool:
        types = [model] * 3 + [keys, values] + [kind.INT32] * 4 + [model, keys_out, values_out]
        ports = [SimpleNamespace(desc=SimpleNamespace(type=t, format=linear)) for t in types]
        return all(plugin.supports_format_combination(pos, ports, 9) for pos in range(12))

    for model in (kind.HALF, kind.BF16):
        assert takes(model, *[model] * 4)
        assert takes(model, *[kind.FP8] * 4)
        assert not takes(model, kind.FP8, model, kind.FP8, model)
        assert not takes(model, kind.FP8, kind.FP8, model, kind.FP8)
        assert not takes(model, *[kind.INT8] * 4)
    assert not takes(kind.FP8, *[kind.FP8] * 4)
    assert not takes(kind.HALF, *[kind.BF16] * 4)

    def inputs(cache: Any) -> list[Any]:
        dims = [(8, 4 * 16), (8, 2 * 16), (8, 2 * 16), (9, 2, 32, 16), (9, 2, 32, 16)]
        return [SimpleNamespace(desc=SimpleNamespace(dims=d, type=cache)) for d in dims]

    plugin.configure_plugin(inputs(kind.FP8), [])
    with pytest.raises(ValueError, match="a cache in the model's dtype has no scales"):
        plugin.configure_plugin(inputs(kind.BF16), [])


# Builds.


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with fast_builds():
        yield


@pytest.fixture(scope="module")
def built(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kv") / "llama.llmc"
    request = BuildRequest(
        str(checkpoint("llama-tiny")), output, target="tensorrt-rtx", sms=(80, 89), kv_dtype="fp8"
    )
    return compile_model(request).path


@needs_tensorrt
@pytest.mark.slow
def test_a_bundle_with_an_fp8_cache(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For SM80 too, which has no FP8 arithmetic: the cache only passes through TensorRT."""
    manifest = Bundle.open(built).manifest
    assert (manifest.precision.dtype, manifest.precision.kv_dtype) == ("bf16", "fp8")
    assert (manifest.operators[0].abi, manifest.operators[0].count) == (1, 2)
    assert (built / "engines/rank0.plan").read_bytes().count(b"num_kv_heads") == 2  # once a plugin
    assert manifest.gpu is not None
    for sm in (80, 89):
        kernels = {
            kernel.variant.split("-")[0]: kernel.variant for kernel in manifest.gpu.kernels if kernel.sm == sm
        }
        for name in ("write_kv", "prefill", "decode"):
            assert kernels[name].startswith(f"{name}-bf16-fp8kv-")
        assert kernels["reduce"].startswith("reduce-bf16-h")
    assert manifest.verification.status == "passed"
    loss = manifest.verification.details["kv_cache_loss"]
    assert (loss["kv_dtype"], loss["positions"]) == ("fp8", manifest.verification.tokens_compared)
    engine = manifest.verification.details["engine"]
    assert loss["mean_kl"] > 0
    assert loss["rms_logit_error"] > engine["rms_logit_error"]  # E4M3 keeps four bits less than bf16
    kinds = {name.partition("/")[0] for name in manifest.files}
    assert kinds == {"engines", "kernels", "tokenizer", "calibration.json"}
    assert main.main(["inspect", str(built)]) == 0
    out = capsys.readouterr().out
    assert "precision  bf16, KV cache fp8" in out
    assert f"a token, fp8: mean KL {loss['mean_kl']:g}, top-1 agreement" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kv_dtype", "held"),
    [("native", "fp16", "fp16"), ("native", "int8", "int8"), ("openvino", "int8", "u8")],
)
def test_a_small_cache_on_the_cpu(
    engine: str, kv_dtype: str, held: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    request = BuildRequest(
        str(checkpoint("llama-tiny")), tmp_path / "x.llmc", engine=engine, kv_dtype=kv_dtype
    )
    result = compile_model(request)
    manifest = result.manifest
    assert (manifest.precision.dtype, manifest.precision.kv_dtype) == ("fp32", held)
    assert manifest.verification.status == "passed"
    assert manifest.verification.max_logit_error is not None
    loss = manifest.verification.details["kv_cache_loss"]
    assert (loss["kv_dtype"], loss["positions"]) == (held, manifest.verification.tokens_compared)
    # Verification is in fp32; 8 bits lose more than its bound allows, and not much.
    smallest, largest = (1e-6, 1e-2) if held == "fp16" else (1e-4, 1)
    assert manifest.verification.max_logit_error < 1e-4
    assert smallest < loss["max_logit_error"] < largest
    assert 0 < loss["mean_kl"] < 0.01 * largest
    measured = judge(result.path, str(checkpoint("llama-tiny")), None, Silent()).figures  # with that cache
    assert measured.mean_kl is not None
    assert loss["mean_kl"] / 3 < measured.mean_kl < loss["mean_kl"] * 3
    engine = load_engine(result.path)
    assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids


def test_the_dry_run_shows_the_cache(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """OpenVINO's cache of int8 is called u8."""
    command = ["build", str(checkpoint("llama-tiny")), "-o", str(tmp_path / "x.llmc"), "--dry-run"]
    assert main.main([*command, "--kv-dtype", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == {"dtype": "fp32", "kv_dtype": "int8"}
    assert main.main([*command, "--kv-dtype", "int8"]) == 0
    assert "KV cache      int8, " in capsys.readouterr().out
    assert main.main([*command, "--kv-dtype", "int8", "--engine", "openvino"]) == 0
    assert "KV cache      u8, " in capsys.readouterr().out
    assert main.main(command) == 0
    assert "KV cache      fp32, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "dtype", "kv_dtype", "held"),
    [
        ("cpu", "fp32", "auto", "fp32"),
        ("cpu", "fp32", "fp16", "fp16"),
        ("cpu", "fp32", "int8", "int8"),
        ("tensorrt-rtx", "bf16", "auto", "bf16"),
        ("tensorrt-rtx", "fp16", "fp8", "fp8"),
        ("tensorrt", "bf16", "fp8", "fp8"),
    ],
)
def test_what_a_cache_holds(target: str, dtype: str, kv_dtype: Any, held: str) -> None:
    request = BuildRequest("x", Path("x.llmc"), target=target, kv_dtype=kv_dtype)
    assert cache_dtype(request, dtype) == held


@pytest.mark.parametrize(
    ("target", "kv_dtype", "message", "hint"),
    [
        ("cpu", "fp8", "the target cpu has no KV cache of fp8", "--kv-dtype fp16 or int8"),
        ("tensorrt-rtx", "int8", "the target tensorrt-rtx has no KV cache of int8", "--kv-dtype fp8"),
        ("tensorrt", "int8", "the target tensorrt has no KV cache of int8", "--kv-dtype fp8"),
        ("cpu", "fp4", "there is no KV cache of 'fp4'", "auto, fp16, fp8, int8"),
    ],
)
def test_caches_that_a_target_has_not(target: str, kv_dtype: Any, message: str, hint: str) -> None:
    with pytest.raises(BuildError, match=message) as error:
        BuildRequest("x", Path("x.llmc"), target=target, kv_dtype=kv_dtype)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama-tiny", {"engine": "onnxruntime"}, "ONNX Runtime cannot .*: it has no KV cache of int8"),
        (
            "llama-tiny",
            {"engine": "openvino", "kv_dtype": "fp16"},
            "OpenVINO cannot .*: it has no KV cache of fp16",
        ),
        ("gemma2-tiny", {"engine": "openvino"}, "OpenVINO cannot .* has an attention softcap"),
        (
            "llama-tiny",
            {"engine": "openvino", "quant": "fp8"},
            "OpenVINO cannot .* it leaves out the rounding",
        ),
    ],
)
def test_engines_that_cannot_run_a_model_with_a_small_cache(
    name: str,
    options: dict[str, Any],
    reason: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The native engine runs each of them."""
    options = {"kv_dtype": "int8", **options}
    request = BuildRequest(str(checkpoint(name)), tmp_path / "x.llmc", **options)
    with pytest.raises(UnsupportedError, match=reason) as error:
        plan_build(request)
    assert error.value.hint == "leave --engine out"
    plan, _ = plan_build(replace(request, engine=None))
    assert (plan.target.engine, plan.resolved.kv_dtype) == ("native", options["kv_dtype"])


# Bundles.


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("version", "kv_dtype", "engine"),
    [
        (1, "fp8", "openvino"),
        (1, "int8", "openvino"),
        (1, "fp16", "openvino"),
        (1, "u8", "native"),
        (2, "u8", "tensorrt-rtx"),
        (2, "int8", "tensorrt-rtx"),
    ],
)
def test_a_manifest_whose_engine_cannot_hold_its_cache_is_refused(
    version: int, kv_dtype: Any, engine: str
) -> None:
    manifest = Manifest.from_json((GOLDEN / f"format-{version}.llmc/manifest.json").read_bytes())
    other = replace(
        manifest,
        precision=replace(manifest.precision, kv_dtype=kv_dtype),
        target=replace(manifest.target, engine=engine),
    )
    with pytest.raises(BundleError, match=rf"precision\.kv_dtype.*{kv_dtype} is no KV cache of {engine}"):
        other.to_json()


def test_a_cache_that_this_llmc_lacks_is_refused() -> None:
    manifest = Manifest.from_json((GOLDEN / "format-2.llmc/manifest.json").read_bytes())
    later = replace(manifest, precision=replace(manifest.precision, kv_dtype="fp3"))
    with pytest.raises(BundleError, match="a KV cache of fp3, which this llmc lacks") as caught:
        later.to_json()
    assert caught.value.hint == upgrade_hint()


def test_a_manifest_with_an_fp8_cache_reads_back_and_a_token_takes_half() -> None:
    manifest = Manifest.from_json((GOLDEN / "format-2.llmc/manifest.json").read_bytes())
    fp8 = replace(manifest, precision=replace(manifest.precision, kv_dtype="fp8"))
    assert Manifest.from_json(fp8.to_json()) == fp8
    assert 2 * block_bytes(manifest.geometry, "fp8") == block_bytes(manifest.geometry, "bf16")
