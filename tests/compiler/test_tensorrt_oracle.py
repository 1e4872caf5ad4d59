"""The oracle of TensorRT builds: the graph that TensorRT gets, rounded alike, against transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmc.compiler import zoo
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.context import choose_context
from llmc.compiler.checkpoint.model_keys import read_model
from llmc.compiler.progress import Silent
from llmc.compiler.targets.tensorrt.target import ORACLE_FILE
from llmc.compiler.verify import verify_build
from llmc.compiler.verify.compare import compare
from llmc.compiler.verify.difference import Difference
from llmc.compiler.verify.job import MIN_TOP1, Findings, Job
from llmc.compiler.weights import write
from llmc.passes import contract
from llmc.passes.geometry import attention_nodes, read_geometry
from llmc.passes.legalize.finalize import serialize
from llmc.passes.pipeline import DTYPES, canonicalize
from llmc.passes.spec import STRUCTURAL
from llmc.runtime.errors import VerificationError
from support.families import DENSE, OTHERS, WITH_EXPERTS, write_random
from support.passes import lower_for_tensorrt, oracle_graph
from support.sampled import every_nth, sampled
from support.traces import trace_once

SOME = (
    "llama-tiny",
    "mistral-tiny",
    "gemma2-tiny",
)  # plain, window, softcap and widened norms; the rest is slow
NAMES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in DENSE]
TALES = Path(__file__).parents[2] / "model_zoo/llama/tales"
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Directory:
    """Stands in for the bundle that weights are written to."""

    root: Path

    def path(self, name: str) -> Path:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        return self.root / name

    def add_hash(self, *record: object) -> None: ...

    def check_disk_space(self, needed: int) -> None: ...


@functools.cache
def canonical(checkpoint: Path, dtype: str) -> ir.Model:
    config = load_config(Checkpoint.open(checkpoint))
    model = trace_once(config, dtype, choose_context(config, None).max_seq_len).model
    contract.run(model, canonicalize())
    return model


def prepare(
    checkpoint: Path, dtype: str, directory: Path, change: Callable[[ir.Model], None] = lambda model: None
) -> Job:
    """Writes the oracle of a checkpoint, lowered in `dtype` and then changed."""
    model = canonical(checkpoint, dtype).clone()
    lower_for_tensorrt(model, dtype)
    opened = Checkpoint.open(checkpoint)
    config = load_config(opened)
    _, renamed = read_model(opened, config)
    write.write_weights(model, renamed.checkpoint.tensors, Directory(directory))  # type: ignore[arg-type]
    change(model)
    path = directory / ORACLE_FILE
    path.write_bytes(serialize(oracle_graph(model, dtype)))
    geometry = read_geometry(model)
    return Job(
        checkpoint=str(checkpoint),
        engine=str(path),
        backend="onnxruntime",
        max_seq_len=choose_context(config, None).max_seq_len,
        vocab_size=geometry.vocab_size,
        windows=sorted({layer.window for layer in geometry.layers if layer.window}),
        tolerance=1e-4,
        needed_bytes=0,
        dtype=dtype,
        tokenizer=str(opened.tokenizer or ""),
    )


# Agreement with transformers.


@pytest.mark.parametrize("name", NAMES)
def test_in_fp32_every_family_is_transformers(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    findings = compare(prepare(checkpoint(name), "fp32", tmp_path))
    assert findings.top1_agreement == 1
    assert findings.max_logit_error <= 1e-4
    assert findings.greedy_equal
    assert not verify_build.faults(findings, "fp32")


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_every_family_is_as_exact_as_transformers(
    name: str, dtype: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    findings = compare(prepare(checkpoint(name), dtype, tmp_path))
    assert not verify_build.faults(findings, dtype)
    assert findings.rms_ratio is not None
    assert 0.8 < findings.rms_ratio < 1.1
    assert findings.greedy_equal is None
    if name == "mistral-tiny":
        assert findings.details["window_crossed"]


@pytest.mark.parametrize("dtype", sampled(["bf16", "fp16", "fp32"], every=3))
def test_the_trained_checkpoint(dtype: str, tmp_path: Path) -> None:
    findings = compare(prepare(TALES, dtype, tmp_path))
    assert not verify_build.faults(findings, dtype)
    if dtype == "fp32":
        return
    assert findings.positions == 400
    assert findings.top1_agreement >= 0.99
    ours, theirs = findings.details["engine"], findings.details[f"transformers_{dtype}"]
    assert ours["mean_kl"] <= 1.2 * theirs["mean_kl"]
    assert ours["top1_agreement_without_ties"] >= 0.99


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_positions_beyond_the_rows_of_a_small_rotary_table(rope: str, tmp_path: Path) -> None:
    """A context that is long enough for `factor_rotary_tables.py`, on a text that reaches its third block."""
    config = AutoConfig.for_model(**dict(zoo.zoo_config("llama-tiny")))
    config.max_position_embeddings = 1024
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    config.rope_parameters = {
        "rope_type": rope, "rope_theta": 1e4, "factor": 4.0, **scaling,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / rope)
    job = prepare(tmp_path / rope, "fp32", tmp_path)
    assert b"rotary_emb.cos_table.high" in Path(job.engine).read_bytes()
    findings = compare(replace(job, windows=[560]))  # 40 tokens more than a window are compared
    assert findings.positions > 600
    assert findings.top1_agreement == 1
    assert findings.greedy_equal
    assert not verify_build.faults(findings, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    every_nth(2, [name for name in OTHERS if name not in WITH_EXPERTS], ("fp16", "bf16")),
)
def test_families_without_a_zoo_model_are_as_exact_too(family: str, dtype: str, tmp_path: Path) -> None:
    """In one of the two dtypes: the graphs differ in their Casts alone, as those above in both show."""
    findings = compare(prepare(write_random(family, tmp_path), dtype, tmp_path / dtype))
    assert not verify_build.faults(findings, dtype)


# What it must not let through.


def scaled_attention(factor: float) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for node in attention_nodes(model):
            scale = node.attributes["scale"].as_float()
            node.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)

    return change


def narrower_window(model: ir.Model) -> None:
    for node in attention_nodes(model):
        node.attributes["window"] = ir.AttrInt64("window", node.attributes["window"].as_int() - 1)


def no_softcap(model: ir.Model) -> None:
    for node in attention_nodes(model):
        node.attributes["softcap"] = ir.AttrFloat32("softcap", 0.0)


def forgotten_residual(model: ir.Model) -> None:
    add = next(node for node in model.graph if node.op_type == "Add")
    ir.convenience.replace_all_uses_with(add.outputs[0], add.inputs[0])


def other_activation(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Gelu":
            node.attributes["approximate"] = ir.AttrString("approximate", "none")


@pytest.mark.parametrize(
    ("name", "dtype", "change"),
    [
        ("llama-tiny", "bf16", forgotten_residual),
        ("mistral-tiny", "bf16", narrower_window),
        ("gemma2-tiny", "bf16", no_softcap),
        ("gemma2-tiny", "fp32", other_activation),  # erf for tanh: less than 16 bits resolve
    ],
)
def test_a_wrong_graph_fails(
    name: str,
    dtype: str,
    change: Callable[[ir.Model], None],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    findings = compare(prepare(checkpoint(name), dtype, tmp_path, change))
    assert verify_build.faults(findings, dtype)


@pytest.mark.parametrize(("dtype", "factor"), [("bf16", 1.05), ("fp16", 1.01)])
def test_a_slightly_wrong_scale_of_attention_fails(dtype: str, factor: float, tmp_path: Path) -> None:
    assert verify_build.faults(compare(prepare(TALES, dtype, tmp_path, scaled_attention(factor))), dtype)


def test_a_coarser_rounding_fails(tmp_path: Path) -> None:
    coarse = prepare(TALES, "bf16", tmp_path)
    findings = compare(replace(coarse, dtype="fp16"))
    assert verify_build.faults(findings, "fp16")
    assert findings.rms_ratio is not None
    assert 6 < findings.rms_ratio < 10  # three bits


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.slow
def test_numbers_that_overflow_fp16_fail(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama-tiny-plain"), dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 1e4
        layer.mlp.down_proj.weight.data *= 1e4
    model.save_pretrained(tmp_path / "large")
    job = prepare(tmp_path / "large", "fp16", tmp_path)
    with pytest.raises(VerificationError, match="does not reproduce the checkpoint") as error:
        verify_build.run(job, Silent())
    assert "--dtype bf16" in error.value.hint


def test_the_build_records_what_was_compared(tmp_path: Path, fast_builds: None) -> None:
    job = replace(prepare(TALES, "bf16", tmp_path), compared="the graph")
    record = verify_build.run(job, Silent())
    assert record.status == "passed"
    assert record.greedy_tokens_equal is None
    assert record.max_logit_error is not None
    assert record.tolerance is not None
    assert record.max_logit_error <= record.tolerance
    assert record.top1_agreement is not None
    assert record.top1_agreement >= MIN_TOP1["bf16"]
    assert record.details["compared"] == "the graph"
    assert record.details["dtype"] == "bf16"
    assert set(record.details["engine"]) == set(record.details["transformers_bf16"])


FINE = Findings(0.2, 0.4, 0.995, 400, None, 0, 0.9)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_logit_error": 0.5}, r"max logit error 5\.00e-01 \(tolerance 4\.00e-01\)"),
        ({"top1_agreement": 0.98}, r"top-1 agreement 0\.9800 \(at least 0\.99\)"),
        ({"rms_ratio": 1.6}, r"rms error 1\.60 times that of transformers in bf16 \(at most 1\.5\)"),
        ({"rms_ratio": float("nan")}, "rms error nan"),
        ({"max_logit_error": float("nan")}, "max logit error nan"),
        ({"tolerance": float("nan")}, "tolerance nan"),
    ],
)
def test_each_bound_is_one_that_a_build_can_fail(
    change: dict[str, float], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("", "", "onnxruntime", 256, 384, [], 1e-4, 0, "bf16")
    monkeypatch.setattr(verify_build, "compare_in_child", lambda *_: FINE)
    assert verify_build.run(job, Silent()).status == "passed"
    monkeypatch.setattr(verify_build, "compare_in_child", lambda *_: replace(FINE, **change))
    with pytest.raises(VerificationError, match=complaint):
        verify_build.run(job, Silent())


@pytest.mark.parametrize(
    ("weights", "ending"), [("checkpoint", "fp32"), ("dequantized", "fp32, on the dequantized weights")]
)
def test_the_record_says_once_which_weights_the_reference_has(
    weights: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("", "", "onnxruntime", 256, 384, [], 1e-4, 0, "bf16")
    monkeypatch.setattr(verify_build, "compare_in_child", lambda *_: FINE)
    record = verify_build.run(replace(job, reference_weights=weights), Silent())
    assert record.reference == f"transformers {transformers.__version__}, eager attention, {ending}"


# Rounding.


def graph(text: str, dtype: str, outputs: dict[str, list[int | str]]) -> ir.Model:
    """A graph of 16-bit tensors from text, with the types and shapes of inner values stated."""
    kind = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    model = ir.from_onnx_text(text.replace("NARROW", kind))
    for node in model.graph:
        for value in node.outputs:
            value.dtype = DTYPES[dtype]
            value.shape = ir.Shape(outputs[str(value.name)])
    return model


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_casts_survive_and_round_as_numpy_does(dtype: str) -> None:
    """ONNX Runtime must not fold a narrowing Cast and a widening one, whatever moves lie between."""
    code = DTYPES[dtype].value
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[4,N] x, int64[2] shape, int32[4] rows) => (float[4,N] y)
          <int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[3] wide = {{1, 4, 1}}> {{
          summed = Add (x, x)
          narrow = Cast <to = {code}> (summed)
          a = Reshape (narrow, shape)
          b, c = Split <axis = 0, num_outputs = 2> (a)
          d = Concat <axis = 0> (b, c)
          e = Gather <axis = 0> (d, rows)
          f = Transpose <perm = [1, 0]> (e)
          h = Transpose <perm = [1, 0]> (f)
          i = Slice (h, zero, four)
          j = Unsqueeze (i, zero)
          k = Expand (j, wide)
          l = Squeeze (k, zero)
          y = Cast <to = 1> (l)
        }}"""
    )
    assert {node.op_type for node in model.graph} - {"Add", "Cast"} <= STRUCTURAL
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (4, 1 << 16), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(bits), bits, 1.0).astype(np.float32)
    values[:, :4] = [32752.0, 32759.99, 2.0**-26, 1.5 * 2.0**-26]  # doubled: fp16's largest, its subnormals
    values[:, 4 : 1 << 12] = rng.standard_normal((4, (1 << 12) - 4))
    feeds = {"x": values, "shape": np.array([4, -1]), "rows": np.arange(4, dtype=np.int32)}
    session = ort.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, feeds)[0])
    with np.errstate(over="ignore"):
        exact = values + values
        expected = exact.astype(NUMPY[dtype]).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    assert (got != exact).mean() > 0.5


MLP = """<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
g (float[T,64] wide_x, NARROW[64] norm, NARROW[96,64] up, NARROW[96] bias, NARROW[64,96] down)
  => (float[T,64] y) {
  x = Cast <to = CODE> (wide_x)
  n = RMSNormalization <axis = -1, epsilon = 1e-6> (x, norm)
  u = Gemm <transB = 1> (n, up, bias)
  s = Sigmoid (u)
  m = Mul (u, s)
  d = Gemm <transB = 1> (m, down)
  r = Add (x, d)
  y = Cast <to = 1> (r)
}"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_small_net_rounds_where_torch_does(dtype: str) -> None:
    shapes: dict[str, list[int | str]] = {name: ["T", 64] for name in "xndry"}
    shapes |= {name: ["T", 96] for name in "usm"}
    model = graph(MLP.replace("CODE", str(DTYPES[dtype].value)), dtype, shapes)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    rng = np.random.default_rng(0)
    norm = LlamaRMSNorm(64)
    norm.weight.data = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(TORCH[dtype])
    sizes = {"up": (96, 64), "bias": (96,), "down": (64, 96)}
    given = {
        name: torch.tensor(rng.standard_normal(shape) * 0.2).to(TORCH[dtype]) for name, shape in sizes.items()
    }
    x = torch.tensor(rng.standard_normal((200, 64)), dtype=torch.float32)
    with torch.no_grad():
        linear, narrow = torch.nn.functional.linear, x.to(TORCH[dtype])
        u = linear(norm(narrow), given["up"], given["bias"])
        expected = (narrow + linear(u * torch.sigmoid(u), given["down"])).float().numpy()
    for name, tensor in (given | {"norm": norm.weight.data}).items():  # weights, as a model has them
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(tensor.float().numpy().astype(NUMPY[dtype]), name=name)
        model.graph.register_initializer(value)
    oracle = oracle_graph(model, dtype)
    session = ort.InferenceSession(serialize(oracle), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, {"wide_x": x.numpy()})[0])
    unit = {"fp16": 2.0**-10, "bf16": 2.0**-7}[dtype]
    assert (got != expected).mean() < 0.03  # sums in another order: a few values at a rounding edge
    assert np.abs(got - expected).max() <= 2 * unit * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["gemma2-tiny", "llama-tiny"])
def test_only_moves_and_casts_touch_16_bits(name: str, dtype: str, checkpoint: Callable[[str], Path]) -> None:
    model = canonical(checkpoint(name), dtype).clone()
    lower_for_tensorrt(model, dtype)
    before = [(v.name, v.dtype) for node in model.graph for v in node.outputs], [*map(str, model.graph)]
    oracle = oracle_graph(model, dtype)
    after = [(v.name, v.dtype) for node in model.graph for v in node.outputs], [*map(str, model.graph)]
    assert before == after, "the graph for TensorRT must stay as it is"
    touched = {
        node.op_type
        for node in oracle.graph
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.dtype == DTYPES[dtype]
    }
    assert touched <= STRUCTURAL | {"Cast"}
    kept = {str(v.name): v.dtype for v in model.graph.initializers.values()}
    assert kept.items() <= {str(v.name): v.dtype for v in oracle.graph.initializers.values()}.items()


# The comparison itself.


def test_differences_are_what_their_definitions_say() -> None:
    rng = np.random.default_rng(0)
    reference = [rng.standard_normal((n, 50)).astype(np.float32) * 3 for n in (7, 4)]
    other = [logits + rng.standard_normal(logits.shape).astype(np.float32) * 0.1 for logits in reference]
    difference = Difference.between(reference, other)
    p, q = torch.tensor(np.concatenate(reference)).double(), torch.tensor(np.concatenate(other)).double()
    kl = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert difference.kl == pytest.approx(float(kl), rel=1e-6)
    assert difference.largest == pytest.approx(float((p - q).abs().max()))
    assert difference.rms == pytest.approx(float((p - q).square().mean().sqrt()))
    swapped = [np.array([[1.0, 3.0, 2.5]], np.float32)]
    assert Difference.between(swapped, [np.array([[0.0, 1.0, 2.0]], np.float32)]).top1_gap == [0.5]
    same = Difference.between(reference, reference)
    assert (same.largest, same.kl, same.top1_gap.max()) == (0, 0, 0)
