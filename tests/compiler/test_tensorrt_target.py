"""The target tensorrt-rtx: engines are built here, without a GPU; none is run."""

from __future__ import annotations

import functools
import hashlib
import importlib
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from llmc.compiler import zoo
from llmc.compiler.progress import Progress, Silent
from llmc.compiler.request import BuildRequest, parse_sms
from llmc.compiler.targets.base import GRAPH_FILE
from llmc.compiler.targets.tensorrt import build, target
from llmc.compiler.targets.tensorrt.errors import explain
from llmc.compiler.trace.export import trace
from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.passes import contract, edit
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.finalize import serialize
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.passes.pipeline import DTYPES, canonicalize
from llmc.plugins.paged_attention.tensorrt_plugin import Attributes, make_plugin
from llmc.runtime.errors import BuildError, UnsupportedError
from llmc.runtime.installation import install_hint
from support.families import DENSE
from support.passes import lower_for_tensorrt

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
SAFETENSORS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "INT64": "I64"}
LIMITS = build.EngineLimits(max_seq_len=256, max_tokens=512, max_sequences=16)
LIBRARY, PLAN_FILE = target.RTX.library, "rank0.plan"
needs_tensorrt = pytest.mark.skipif(
    not build.is_installed(LIBRARY), reason="the package tensorrt-rtx is not installed"
)


def build_engine(
    model: ir.Model, graph: Path, plan: Path, limits: build.EngineLimits, progress: Progress, sms: Any = ()
) -> build.BuiltEngine:
    profile = build.profile(model, limits)
    return build.build(build.EngineJob(LIBRARY, str(graph), str(plan), profile, tuple(sms)), progress)


@functools.cache
def canonical(name: str, dtype: str) -> ir.Model:
    """The canonical graph of a zoo model, computing in `dtype`, without weights."""
    config = dict(zoo.zoo_config(name))
    model = trace(AutoConfig.for_model(config.pop("model_type"), **config), dtype, 256).model
    contract.run(model, canonicalize())
    return model


def lowered(name: str, dtype: str, directory: Path) -> tuple[ir.Model, Path]:
    """The graph for TensorRT and its file in `directory`, with random weights beside it."""
    model = canonical(name, dtype).clone()
    lower_for_tensorrt(model, dtype)
    write_random_weights(model, directory)
    path = directory / GRAPH_FILE
    path.write_bytes(to_tensorrt(model).SerializeToString())
    return model, path


def write_random_weights(model: ir.Model, directory: Path) -> None:
    """Gives every initializer without data random values, in a safetensors file, as a bundle has them."""
    values = [v for v in model.graph.initializers.values() if v.const_value is None]
    rng = np.random.default_rng(0)

    def produce(name: str) -> list[np.ndarray]:
        value = model.graph.initializers[name]
        assert value.dtype is not None
        drawn = rng.standard_normal(edit.dims(value)) * 0.1
        return [drawn.astype(value.dtype.numpy()).reshape(-1).view(np.uint8)]

    file = "weights/model.safetensors"
    (directory / "weights").mkdir()
    entries = [(str(v.name), SAFETENSORS[v.dtype.name], edit.dims(v)) for v in values if v.dtype]
    spans = write_safetensors(directory / file, entries, produce)[2]
    for v in values:
        assert v.dtype is not None
        assert v.shape is not None
        v.const_value = ir.ExternalTensor(
            file, *spans[str(v.name)], v.dtype, shape=v.shape, name=str(v.name), base_dir=directory
        )


class Steps(Silent):
    """Records the progress."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def bar(self, done: int, total: int) -> None:
        assert total == 1000
        self.done.append(done)


def engine(
    name: str, dtype: str, directory: Path, sms: tuple[int, ...] = ()
) -> tuple[build.BuiltEngine, bytes, ir.Model]:
    model, graph = lowered(name, dtype, directory)
    plan = directory / PLAN_FILE
    built = build_engine(model, graph, plan, LIMITS, Silent(), sms)
    assert built.plan_bytes == plan.stat().st_size
    return built, plan.read_bytes(), model


# Building.


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", DENSE)
def test_every_family_builds(name: str, dtype: str, tmp_path: Path) -> None:
    built, plan, _ = engine(name, dtype, tmp_path)
    layers = zoo.zoo_config(name)["num_hidden_layers"]
    assert built.attention_layers == layers
    assert plan.count(b"num_kv_heads") == layers  # the attributes are stored once a plugin
    assert (tmp_path / "weights/model.safetensors").stat().st_size < built.plan_bytes


@needs_tensorrt
def test_two_builds_are_the_same_bytes_and_the_progress_only_grows(tmp_path: Path) -> None:
    steps = Steps()
    plans = []
    for name in ("here", "in a directory with a longer name"):
        (tmp_path / name).mkdir()
        model, graph = lowered("llama-tiny", "bf16", tmp_path / name)
        plan = tmp_path / name / PLAN_FILE
        built = build_engine(model, graph, plan, LIMITS, steps if not plans else Silent())
        assert hashlib.sha256(plan.read_bytes()).hexdigest() == built.plan_sha256
        plans.append(plan.read_bytes())
    assert plans[0] == plans[1]  # on Linux, where the child may switch off address randomization
    assert steps.done == sorted(set(steps.done))
    assert steps.done[-1] == 1000


@needs_tensorrt
def test_named_gpus_get_one_engine_together(tmp_path: Path) -> None:
    built, _, _ = engine("llama-tiny", "bf16", tmp_path, parse_sms("sm_120, 86,89"))
    assert built.attention_layers == 2


@needs_tensorrt
def test_gemma2_softcap_stays_inside_the_plugin(tmp_path: Path) -> None:
    _, plan, model = engine("gemma2-tiny", "fp16", tmp_path)
    assert [node.attributes["softcap"].as_float() for node in attention_nodes(model)] == [5.0] * 4
    assert Counter(node.op_type for node in model.graph)["Tanh"] == 1  # the cap of the logits
    assert plan.count(b"softcap") == 4


@needs_tensorrt
def test_the_plugin_refuses_to_run_without_kernels() -> None:
    creator = make_plugin(importlib.import_module(LIBRARY))
    trt = importlib.import_module(LIBRARY)
    values = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.5, "window": 7, "softcap": 3.0}
    given = trt.PluginFieldCollection([])
    arrays = [np.array([v], np.int32 if isinstance(v, int) else np.float32) for v in values.values()]
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
    for name, array in zip(values, arrays, strict=True):
        given.append(trt.PluginField(name, array, kinds[array.dtype]))
    plugin = creator.create_plugin("p", given, trt.TensorRTPhase.RUNTIME)
    assert plugin.attributes == Attributes(4, 2, 0.5, 7, 3.0)
    stored = {field.name: np.asarray(field.data).item() for field in plugin.get_fields_to_serialize()}
    assert stored == values
    assert [plugin.clone().get_aliased_input(output) for output in range(3)] == [-1, 3, 4]
    with pytest.raises(RuntimeError, match="cannot launch"):
        plugin.enqueue(None, None, None, None, None, None)
    builds = creator.create_plugin("p", given, trt.TensorRTPhase.BUILD)
    for plugin in (
        builds,
        builds.clone(),
        builds.attach_to_context(None),
    ):  # timed by the builder, with nothing lent
        plugin.enqueue(None, None, None, None, None, None)


# Lowering.


def norm_graph(dtype: str) -> ir.Model:
    """y = norm(x, weight + 1), as the passes write Gemma's."""
    kind = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g ({kind}[T,64] x, {kind}[64] weight) => ({kind}[T,64] y) <{kind} one = {{1}}> {{
          scale = Add (weight, one)
          y = RMSNormalization <axis = -1, epsilon = 1e-6> (x, scale)
        }}"""
    )
    dtypes = DTYPES[dtype]
    one = np.array(1, dtypes.numpy())
    model.graph.initializers["one"].const_value = ir.tensor(one, name="one")
    for node in model.graph:
        node.outputs[0].dtype = dtypes
        node.outputs[0].shape = ir.Shape([64] if node.op_type == "Add" else ["T", 64])
    return model


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_gemma_norm_rounds_once_as_transformers_does(dtype: str) -> None:
    rng = np.random.default_rng(0)
    kind = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    x = (rng.standard_normal((9, 64)) * 4).astype(kind)
    weight = (rng.standard_normal(64) * 0.3).astype(kind)
    norm = Gemma3RMSNorm(64, eps=1e-6)
    norm.weight.data = torch.tensor(weight.astype(np.float32)).to(TORCH[dtype])
    with torch.no_grad():
        expected = norm(torch.tensor(x.astype(np.float32)).to(TORCH[dtype])).float().numpy()

    def run(model: ir.Model) -> np.ndarray:
        proto = onnx.ModelProto.FromString(serialize(model))
        outputs: Any = ReferenceEvaluator(proto).run(None, {"x": x, "weight": weight})
        return np.asarray(outputs[0]).astype(np.float32)

    before = run(norm_graph(dtype))
    model = norm_graph(dtype)
    lower_for_tensorrt(model, dtype)
    after = run(model)
    unit = 2.0 ** (-10 if dtype == "fp16" else -7)
    wrong = np.abs(after - expected) > 0
    assert wrong.mean() < 0.01  # sums in another order: a few values at a rounding edge
    assert np.abs(after - expected).max() <= unit * np.abs(expected).max()
    assert (np.abs(before - expected) > 0).mean() > 0.2  # what the lowering is for


def test_the_lowered_graph_names_its_plugin_and_carries_no_body(tmp_path: Path) -> None:
    model, graph = lowered("gemma2-tiny", "bf16", tmp_path)
    proto = onnx.load(str(graph), load_external_data=False)
    assert not proto.functions
    paged = [node for node in proto.graph.node if node.op_type == "PagedAttention"]
    for node in paged:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (given["plugin_namespace"], given["plugin_version"]) == (b"llmc", b"1")
    norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
    assert {edit.operand(node, 1).dtype for node in norms} == {ir.DataType.FLOAT}
    assert model.graph.outputs[0].name == "logits"
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert {value.dtype for value in model.graph.inputs if "_cache" not in str(value.name)} == {
        ir.DataType.INT32
    }
    modules = {p.value for node in proto.graph.node for p in node.metadata_props if p.key == "llmc.module"}
    assert "model.layers.0.self_attn" in modules
    assert str(Path.cwd()).encode() not in graph.read_bytes()


def test_a_graph_in_another_dtype_is_refused(tmp_path: Path) -> None:
    model = canonical("llama-tiny", "bf16").clone()
    with pytest.raises(BuildError, match=r"self_attn computes in BFLOAT16, the TensorRT engine in fp16"):
        lower_for_tensorrt(model, "fp16")


def test_one_profile_covers_one_token_up_to_the_limits(tmp_path: Path) -> None:
    model, _ = lowered("llama-tiny", "bf16", tmp_path)
    shapes = build.profile(model, LIMITS)
    assert shapes["input_ids"] == ((1,), (16,), (512,))
    assert shapes["query_start"] == ((2,), (17,), (17,))
    assert shapes["block_indices"] == ((1,), (16,), (16 * 8,))
    _, kv_heads, block, width = edit.dims(attention_nodes(model)[0].inputs[3])  # type: ignore[arg-type]
    assert shapes["key_cache.0"][0] == (1, kv_heads, block, width)
    assert np.prod(shapes["key_cache.0"][2]) < 2**31


# What goes wrong.


def check(name: str, sms: tuple[int, ...], dtype: str = "bf16", quant: str | None = None) -> tuple[int, ...]:
    request = BuildRequest("checkpoint", Path("x.llmc"), target=name, sms=sms, quant=quant)
    stored = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    return target.TensorRTTarget(target.FLAVORS[name]).resolve(request, stored).sms


@pytest.mark.parametrize(
    ("name", "sms", "dtype", "message", "hint"),
    [
        ("tensorrt-rtx", (75, 89), "bf16", "SM75 has no bf16", "leave this GPU out of --sm"),
        ("tensorrt-rtx", (75,), "fp16", "no attention kernels for SM75", "SM80"),
        ("tensorrt-rtx", (90,), "bf16", "tensorrt-rtx builds no engine for SM90", "--target tensorrt does"),
        ("tensorrt-rtx", (61,), "fp16", "tensorrt-rtx builds no engine for SM61", "it knows SM 75, 80"),
    ],
)
def test_gpus_that_cannot_be(name: str, sms: tuple[int, ...], dtype: str, message: str, hint: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as error:
        check(name, sms, dtype)
    assert hint in error.value.hint


@pytest.mark.parametrize("name", list(target.FLAVORS))
def test_a_missing_library_is_named_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "is_installed", lambda library: False)
    with pytest.raises(BuildError, match=f"needs the package {name}") as error:
        check(name, ())
    assert error.value.hint == install_hint(name)


def test_the_enterprise_target_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt import cuda
    from llmc.runtime.backends.tensorrt.checks import Device

    def absent() -> Device:
        raise CudaError("no CUDA-capable device is detected")

    monkeypatch.setattr(build, "is_installed", lambda library: True)
    monkeypatch.setattr(cuda, "probe", absent)
    with pytest.raises(BuildError, match="with an NVIDIA GPU only: no CUDA-capable device") as error:
        check("tensorrt", ())
    assert "--target tensorrt-rtx" in error.value.hint
    monkeypatch.setattr(cuda, "probe", lambda: Device("H100", 90, (13, 0), 132, 232448))
    check("tensorrt", (90,))
    with pytest.raises(UnsupportedError, match="builds for the GPU that is here, SM90"):
        check("tensorrt", (100,))


def test_without_sm_the_enterprise_target_asks_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "is_installed", lambda library: True)
    monkeypatch.setattr(target, "_this_gpu", lambda wanted: (100,))
    assert check("tensorrt", (), quant="fp8") == check("tensorrt", (), quant="nvfp4") == (100,)
    monkeypatch.setattr(target, "_this_gpu", lambda wanted: (90,))
    assert check("tensorrt", (), quant="fp8") == (90,)
    with pytest.raises(UnsupportedError, match="nvfp4 needs SM100 or newer, but the engine is for SM90"):
        check("tensorrt", (), quant="nvfp4")
    monkeypatch.setattr(target, "_this_gpu", lambda wanted: (70,))
    with pytest.raises(UnsupportedError, match="tensorrt builds no engine for SM70"):
        check("tensorrt", ())
    with pytest.raises(UnsupportedError, match="a portable engine must run on SM80"):
        check("tensorrt-rtx", (), quant="fp8")


@needs_tensorrt
def test_tensorrt_itself_refuses_bf16_for_a_gpu_without_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="TensorRT cannot compile bf16 for SM75") as late:
        engine("llama-tiny", "bf16", tmp_path, (75,))
    assert "--sm" in late.value.hint
    assert not (tmp_path / PLAN_FILE).exists()


@needs_tensorrt
def test_a_truncated_graph(tmp_path: Path) -> None:
    model, graph = lowered("llama-tiny", "bf16", tmp_path)
    graph.write_bytes(graph.read_bytes()[:-1000])
    with pytest.raises(BuildError, match=r"rank0\.onnx is damaged"):
        build_engine(model, graph, tmp_path / "plan", LIMITS, Silent())


@needs_tensorrt
def test_truncated_weights(tmp_path: Path) -> None:
    model, graph = lowered("llama-tiny", "bf16", tmp_path)
    weights = tmp_path / "weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BuildError):
        build_engine(model, graph, tmp_path / "plan", LIMITS, Silent())


@needs_tensorrt
def test_an_operator_that_tensorrt_lacks_is_named_with_its_module(tmp_path: Path) -> None:
    model, graph = lowered("llama-tiny", "bf16", tmp_path)
    node = next(node for node in model.graph if node.op_type == "Sigmoid")
    node.op_type = "BitShift"
    graph.write_bytes(serialize(model))
    with pytest.raises(BuildError, match=r"operator BitShift of module model\.layers\.0\.mlp"):
        build_engine(model, graph, tmp_path / "plan", LIMITS, Silent())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], build.EngineJob]:
    """Code of a module that stands in for TensorRT -> a job that uses it."""

    def make(code: str) -> build.EngineJob:
        (tmp_path / "fake_tensorrt.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        return build.EngineJob("fake_tensorrt", str(tmp_path / "graph.onnx"), str(tmp_path / "plan"), {})

    return make


def test_a_killed_build_leaves_nothing(library: Callable[[str], build.EngineJob], tmp_path: Path) -> None:
    job = library(
        "import os\nopen('PLAN', 'w')\nos.kill(os.getpid(), 9)".replace("PLAN", str(tmp_path / "plan"))
    )
    with pytest.raises(BuildError, match=r"killed by signal 9 \(Killed\)") as error:
        build.build(job, Silent())
    assert "memory" in error.value.hint
    assert not (tmp_path / "plan").exists()


def test_an_abort_is_told_with_its_last_words(library: Callable[[str], build.EngineJob]) -> None:
    job = library("import os, sys\nprint('no libtensorrt', file=sys.stderr, flush=True)\nos.abort()")
    with pytest.raises(BuildError, match=r"signal 6 \(Aborted\): no libtensorrt"):
        build.build(job, Silent())


def test_what_a_library_prints_is_not_taken_for_a_message(library: Callable[[str], build.EngineJob]) -> None:
    job = library("print('{\"plan_bytes\": 1}', flush=True)\nraise ValueError('stop')")
    with pytest.raises(BuildError, match=r"exit code 1: ValueError: stop"):
        build.build(job, Silent())


def test_the_scratch_directory_goes_with_the_build(
    library: Callable[[str], build.EngineJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with pytest.raises(BuildError):
        build.build(library("raise SystemExit(3)"), Silent())
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("86.9", "'86.9' is not a compute capability"),
        ("86,hopper", "'hopper' is not a compute capability"),
    ],
)
def test_gpus_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=message) as error:
        parse_sms(text)
    assert error.value.hint


def test_gpus_are_sorted_and_named_once() -> None:
    assert parse_sms("") == ()
    assert parse_sms("120,SM86, sm_89,86") == (86, 89, 120)


MODULES = {"model.layers.1": "wrong", "model.layers.1.mlp.up": "model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize(
    ("complaints", "message", "kind"),
    [
        (
            ["(Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: b16. In"],
            "TensorRT cannot compile bf16 for SM75",
            UnsupportedError,
        ),
        (["Error Code 2: OutOfMemory (no further information)"], "TensorRT ran out of memory", BuildError),
        (
            ["node model.layers.1.mlp.up [Gemm]: shapes"],
            "TensorRT could not build the engine for module model.layers.1.mlp.up_proj: node",
            BuildError,
        ),
        ([], "TensorRT could not build the engine: TensorRT gave no reason", BuildError),
    ],
)
def test_explanations(complaints: list[str], message: str, kind: type[Exception]) -> None:
    error = explain(complaints, MODULES)
    assert str(error).startswith(message)
    assert type(error) is kind
    assert error.hint


GIVEN = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.5, "window": 0, "softcap": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "3 query heads cannot share 2"),
        ({"sinks": 1}, "of ABI 1 does not know sinks"),
        ({"window": None}, "lacks window"),
    ],
)
def test_attributes_of_another_plugin_are_refused(change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        Attributes.read(given)
    assert Attributes.read(GIVEN) == Attributes(4, 2, 0.5, 0, 0.0)
