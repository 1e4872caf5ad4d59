"""Prints a sha256 for every file of 45 small builds: an edit that should change nothing prints the same.

    make replay                                       # prints `sha256  case/file` lines
    make replay > before.txt; ...edit...; make replay COMPARE=before.txt

With COMPARE the lines that differ go to stderr, and the exit code is 1 if there are any. The hashes hold for
one machine and one set of library versions, so none are kept in the repository.

The cases cover the formats, TensorRT-RTX, quantized KV caches, and a sample of the families and of
pre-quantized checkpoints. On the CPU they are for the native engine, which is the default; some are also for
the other engines. CPU bundles are built whole, without the verification. For TensorRT the graphs are
hashed: the one for the parser, and the ones that stand in for the engine in the verification.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums of floats depend on the number of threads
sys.path.insert(0, str(Path(__file__).parent))

from llmc.compiler import zoo
from llmc.compiler.build_key import FIELD
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.tensorrt.target import oracle_graph
from llmc.passes.legalize.finalize import serialize
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from support.quantized_layouts import CONFIG, LAYOUTS, assemble, weights

TALES = Path(__file__).parents[1] / "model_zoo" / "llama" / "tales"
# (checkpoint, options of BuildRequest); a checkpoint is a name of the zoo, "tales", or a pre-quantized layout
CPU = (
    ("llama-tiny", {}),
    ("llama-tiny-plain", {"quant": "int8-smoothquant"}),
    ("llama-tiny", {"quant": "int8", "exclude": ("lm_head",)}),
    ("mistral-tiny", {"quant": "int8"}),
    ("qwen2-tiny", {"quant": "int4"}),
    ("qwen3-tiny", {"quant": "fp8"}),
    ("qwen3-tiny", {"kv_dtype": "int8"}),
    ("phi3-tiny", {"quant": "nvfp4"}),
    ("gemma2-tiny", {}),
    ("gemma2-tiny", {"quant": "int8"}),
    ("gemma3-tiny", {"quant": "nvfp4-weight-only"}),
    ("qwen2-tiny", {"quant": "mxfp4"}),
    ("llama-tiny", {"quant": "fp8-per-channel", "calibration_method": "mse"}),
    ("tales", {"quant": "int4-block128"}),
    ("modelopt-fp8", {}),
    ("modelopt-fp8-block", {}),
    ("modelopt-nvfp4-awq", {}),
    ("modelopt-awq", {}),
    ("ct-nvfp4", {}),
    ("ct-int4-asymmetric", {}),
    ("ct-w8a8", {}),
    ("deepseek", {}),
    ("llama-tiny", {"engine": "openvino"}),
    ("llama-tiny-plain", {"engine": "openvino", "quant": "int8-smoothquant"}),
    ("mistral-tiny", {"engine": "openvino", "quant": "int8"}),
    ("qwen2-tiny", {"engine": "openvino", "quant": "int4"}),
    ("qwen3-tiny", {"engine": "openvino", "kv_dtype": "int8"}),
    ("gemma3-tiny", {"engine": "openvino", "quant": "nvfp4-weight-only"}),
    ("qwen2-tiny", {"engine": "openvino", "quant": "mxfp4"}),
    ("modelopt-fp8-block", {"engine": "openvino"}),
    ("ct-int4-asymmetric", {"engine": "openvino"}),
    ("ct-w8a8", {"engine": "openvino"}),
    ("gemma2-tiny", {"engine": "onnxruntime"}),
    ("qwen3-tiny", {"engine": "onnxruntime", "quant": "fp8"}),
    ("phi3-tiny", {"engine": "onnxruntime", "quant": "nvfp4"}),
    ("ct-nvfp4", {"engine": "onnxruntime"}),
)
TENSORRT = (
    ("llama-tiny", {"dtype": "bf16"}),
    ("gemma3-tiny", {"dtype": "fp16"}),
    ("gemma2-tiny", {"dtype": "bf16", "kv_dtype": "fp8"}),
    ("qwen3-tiny", {"quant": "fp8", "kv_dtype": "fp8", "sms": (89,)}),
    ("phi3-tiny", {"quant": "nvfp4", "sms": (120,)}),
    ("mistral-tiny", {"quant": "int4"}),
    ("qwen2-tiny", {"quant": "int8-smoothquant"}),
    ("modelopt-fp8", {"sms": (89,)}),
    ("ct-int4", {}),
)


def lines(work: Path) -> Iterator[str]:
    """`sha256  case/file`, in a fixed order."""
    for name, options in CPU:
        case = _case("cpu", name, options)
        output = work / "model.llmc"
        compile_model(BuildRequest(_checkpoint(name, work), output, verify=False, force=True, **options))
        for file in sorted(path for path in output.rglob("*") if path.is_file()):
            name = str(file.relative_to(output))
            yield _line(case, name, _without_key(file) if name == MANIFEST_NAME else file.read_bytes())
    for name, options in TENSORRT:
        case = _case("tensorrt-rtx", name, options)
        request = BuildRequest(
            _checkpoint(name, work), work / "unused.llmc", target="tensorrt-rtx", **options
        )
        plan, inputs = plan_build(request)
        yield _line(case, "rank0.onnx", serialize(inputs.model))
        for_parser = to_tensorrt(inputs.model).SerializeToString(deterministic=True)
        yield _line(case, "parser.onnx", for_parser)
        for rounded in (False, True):
            oracle = oracle_graph(inputs.model, plan.resolved.dtype, round_cache=rounded)
            yield _line(case, f"oracle-{rounded}.onnx", serialize(oracle))


def _without_key(file: Path) -> bytes:
    """Return a manifest without the hash of inputs and versions, which every edit of llmc changes."""
    manifest = Manifest.from_json(file.read_bytes())
    details = {key: value for key, value in manifest.verification.details.items() if key != FIELD}
    return replace(manifest, verification=replace(manifest.verification, details=details)).to_json()


def _case(target: str, name: str, options: dict[str, object]) -> str:
    return "-".join([target, name, *(str(value).strip("(),").replace("'", "") for value in options.values())])


def _line(case: str, file: str, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {case}/{file}"


def _checkpoint(name: str, work: Path) -> str:
    if name == "tales":
        return str(TALES)
    directory = work / "checkpoints" / name
    if not directory.exists():
        directory.parent.mkdir(exist_ok=True)
        if name in LAYOUTS:
            quantizer, settings, _ = LAYOUTS[name]
            written = assemble(directory, dict.fromkeys(weights(), quantizer), settings)
            written.config |= CONFIG
            written.write()
        else:
            zoo.make(name, directory)
    return str(directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="lines that an earlier run printed")
    before = parser.parse_args().compare
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of every parameter without data
    printed = []
    with tempfile.TemporaryDirectory() as work:
        for line in lines(Path(work)):
            print(line, flush=True)
            printed.append(line)
    if before is None:
        return 0
    known = [line for line in before.read_text("utf-8").splitlines() if "  " in line]
    changed = [f"- {line}" for line in known if line not in printed]
    changed += [f"+ {line}" for line in printed if line not in known]
    print("\n".join(changed) or "nothing changed", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
