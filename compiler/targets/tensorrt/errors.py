"""Translate TensorRT's messages into llmc's errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llmc.runtime.errors import BuildError, LlmcError, UnsupportedError

_DTYPES = {"b16": "bf16", "f16": "fp16", "f8e4m3": "fp8", "fp4_e2m1": "fp4"}  # TensorRT's names -> ours
REPORT = "please report this with the model's config.json"


def explain(complaints: Iterable[str], modules: Mapping[str, str]) -> LlmcError:
    """Return the BuildError or UnsupportedError for TensorRT's error messages.

    complaints: the messages, in their order
    modules: node name -> module of the checkpoint
    """
    lines = [line.strip() for line in complaints if line.strip()]
    text = "\n".join(lines)
    if match := re.search(
        r"Cannot compile for target\(s\) ([\w, ]+?),? because.*?datatypes: ([\w, ]+)", text
    ):
        gpus, dtypes = match[1].upper(), ", ".join(_DTYPES.get(d, d) for d in re.findall(r"\w+", match[2]))
        return UnsupportedError(
            f"TensorRT cannot compile {dtypes} for {gpus}",
            "leave this GPU out of --sm, or build with another --dtype",
        )
    if re.search(r"out of memory|bad_alloc|OutOfMemory", text, re.IGNORECASE):
        return BuildError(
            "TensorRT ran out of memory", "a build takes about 2.5 times the size of the weights"
        )
    first = lines[0] if lines else "TensorRT gave no reason"
    named = max(
        (name for name in modules if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)),
        key=len,
        default="",
    )
    where = f" for module {modules[named]}" if named else ""
    return BuildError(f"TensorRT could not build the engine{where}: {first}", REPORT)
