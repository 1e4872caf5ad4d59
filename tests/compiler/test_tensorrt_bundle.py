"""`llmc build --target tensorrt-rtx` from the checkpoint to the bundle, on a machine without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest, compute_dtype
from llmc.compiler.targets.tensorrt import build, kernels, target
from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError, BuildError, UnsupportedError
from llmc.runtime.load import load_engine
from support.families import DENSE
from support.sampled import every_nth

pytestmark = pytest.mark.skipif(
    not build.is_installed("tensorrt_rtx"), reason="the package tensorrt-rtx is not installed"
)


def request(checkpoint: Path, output: Path, **options: object) -> BuildRequest:
    return BuildRequest(str(checkpoint), output, target="tensorrt-rtx", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gpu") / "mistral.llmc"
    return compile_model(request(checkpoint("mistral-tiny"), output, sms=(80, 89), dtype="fp16")).path


def test_a_bundle_holds_the_engine_its_kernels_and_nothing_twice(built: Path) -> None:
    bundle = Bundle.open(built)
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.gpu is not None
    assert manifest.gpu.compute_capabilities == (80, 89)
    assert {(kernel.kind, kernel.sm) for kernel in manifest.gpu.kernels} == {("cubin", 80), ("cubin", 89)}
    assert {kernel.variant.partition("-")[0] for kernel in manifest.gpu.kernels} >= {
        "decode", "prefill", "reduce", "write_kv",
    }  # fmt: skip
    assert any("window" in kernel.variant for kernel in manifest.gpu.kernels)
    assert manifest.weights.files == ()
    assert {name.partition("/")[0] for name in manifest.files} == {"engines", "kernels", "tokenizer"}
    for kernel in manifest.gpu.kernels:
        code = (built / kernel.file).read_bytes()
        assert code.startswith(b"\x7fELF")
        assert kernel.entry.encode() in code


def test_the_manifest_says_how_near_the_graph_is(built: Path) -> None:
    record = Bundle.open(built).manifest.verification
    assert record.status == "passed"
    assert record.top1_agreement is not None
    assert record.top1_agreement >= 0.99
    assert record.tokens_compared == 256 + 60 + 40  # the first text, as far as the context goes
    assert record.details["dtype"] == "fp16"


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(
    built: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    own_traces: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no kernel of the first build
    output = tmp_path / "again, somewhere else" / ("a" * 100) / "mistral.llmc"
    compile_model(request(checkpoint("mistral-tiny"), output, sms=(80, 89), dtype="fp16"))
    names = [str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()]
    different = [name for name in names if (built / name).read_bytes() != (output / name).read_bytes()]
    assert different == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), every_nth(2, DENSE, ("fp16", "bf16")))
def test_every_family_becomes_a_bundle(
    name: str, dtype: str, checkpoint: Callable[[str], Path], tmp_path: Path, fast_builds: None
) -> None:
    """test_tensorrt_oracle.py verifies the graph of every family in both dtypes."""
    result = compile_model(request(checkpoint(name), tmp_path / "x.llmc", sms=(89,), dtype=dtype))
    manifest = result.manifest
    assert manifest.verification.status == "passed"
    assert manifest.operators[0].count == manifest.geometry.num_layers
    assert manifest.precision.dtype == manifest.precision.kv_dtype == dtype


def test_inspect_shows_what_a_gpu_engine_is(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", str(built)]) == 0
    out = capsys.readouterr().out
    for line in (
        r"engine     tensorrt-rtx: for NVIDIA GPUs of compute capability 8.0, 8.9",
        r"precision  fp16, KV cache fp16",
        r"2 llmc.PagedAttention (ABI 1)",
        r"GPUs       SM80, SM89",
        r"a step     at most 8192 tokens, 256 sequences, 1024 rows of logits",
        r"cubin for SM80",
        r"fidelity   verified, the graph and not yet the engine, against transformers",
    ):
        assert line in out
    assert main.main(["inspect", str(built), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["manifest"]
    assert shown == json.loads((built / "manifest.json").read_text())


def test_the_dry_run_shows_the_plan(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "build",
        str(checkpoint("llama-tiny")),
        "--target",
        "tensorrt-rtx",
        "--sm",
        "sm_120,86",
        "--dry-run",
    ]
    assert main.main([*command, "-o", str(tmp_path / "x.llmc"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["precision"] == {"dtype": "bf16", "kv_dtype": "bf16"}
    assert plan["target"]["reason"] == "for NVIDIA GPUs of compute capability 8.6, 12.0"
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_the_runtime_gives_the_reason(built: Path) -> None:
    with pytest.raises(BackendError, match="mistral cannot run here: ") as error:
        load_engine(built)
    assert "--target" in error.value.hint


@pytest.mark.parametrize(
    ("sms", "expected"),
    [
        ((), [(80, "cubin"), (86, "cubin"), (89, "cubin"), (120, "cubin"), (89, "ptx")]),
        ((86, 120), [(86, "cubin"), (120, "cubin")]),
        ((121,), [(89, "ptx")]),
        ((90, 103), [(90, "cubin"), (89, "ptx")]),
    ],
)
def test_code_for_gpus(sms: tuple[int, ...], expected: list[tuple[int, str]]) -> None:
    assert kernels.codes(sms) == expected


@pytest.mark.parametrize(
    ("stored", "computes"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "bf16")]
)
def test_auto_takes_the_checkpoints_16_bits(stored: str, computes: str) -> None:
    assert compute_dtype(request(Path("x"), Path("x.llmc")), stored) == computes
    assert compute_dtype(BuildRequest("x", Path("x.llmc")), stored) == "fp32"


# What goes wrong leaves nothing behind.


def fails(checkpoint: Path, directory: Path, message: str, **options: object) -> str:
    with pytest.raises((BuildError, UnsupportedError), match=message) as error:
        compile_model(request(checkpoint, directory / "x.llmc", verify=False, **options))
    assert list(directory.iterdir()) == []
    return error.value.hint


def test_too_little_memory_is_predicted(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "available_memory", lambda: 100 << 20)
    hint = fails(
        checkpoint("llama-tiny"), tmp_path, r"needs about 0\.3 GiB of memory, 0\.1 GiB are available"
    )
    assert "larger machine" in hint


def test_a_killed_engine_build(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/fake_tensorrt.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=":")
    flavor = target.Flavor("tensorrt-rtx", "fake_tensorrt", (89,), True)
    monkeypatch.setitem(target.FLAVORS, "tensorrt-rtx", flavor)
    monkeypatch.setattr(build, "is_installed", lambda library: True)
    (tmp_path / "bundles").mkdir()
    hint = fails(checkpoint("llama-tiny"), tmp_path / "bundles", "killed by signal 9", sms=(89,))
    assert "memory" in hint


def test_a_gpu_that_the_target_cannot_serve(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    hint = fails(checkpoint("llama-tiny"), tmp_path, "builds no engine for SM90", sms=(90,))
    assert hint == "--target tensorrt does"


def test_weights_beyond_fp16(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("llama-tiny")
    large = tmp_path / "large"
    large.mkdir()
    (tmp_path / "bundles").mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (large / file.name).write_bytes(file.read_bytes())
    tensors = Checkpoint.open(source).tensors
    arrays = {name: ref.read() for name, ref in tensors.items()}
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * np.float32(1e6)
    entries = [(name, ref.dtype, ref.shape) for name, ref in tensors.items()]
    write_safetensors(large / "model.safetensors", entries, lambda name: [arrays[name].view(np.uint8)])
    hint = fails(
        large, tmp_path / "bundles", r"model\.norm\.weight has values that fp16 cannot hold", dtype="fp16"
    )
    assert "bf16" in hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cpu", "dtype": "bf16"}, "the target cpu does not compute in bf16"),
        ({"target": "tensorrt-rtx", "dtype": "fp32"}, "the target tensorrt-rtx does not compute in fp32"),
        ({"target": "cpu", "sms": (89,)}, "--sm names GPUs"),
        ({"target": "rocm"}, "there is no target 'rocm'"),
    ],
)
def test_requests_that_contradict_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=message) as error:
        BuildRequest("x", Path("x.llmc"), **options)  # type: ignore[arg-type]
    assert error.value.hint


def test_a_missing_tensorrt_is_said_before_anything_is_traced(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "is_installed", lambda library: False)
    with pytest.raises(BuildError, match="needs the package tensorrt-rtx"):
        plan_build(request(checkpoint("llama-tiny"), tmp_path / "x.llmc"))


def test_the_manifest_reads_back(built: Path) -> None:
    data = (built / "manifest.json").read_bytes()
    assert Manifest.from_json(data).to_json() == data
