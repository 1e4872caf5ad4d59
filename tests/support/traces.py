"""Traces that several tests start from: each is made once and copied for every test."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.context import choose_context
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.trace import export
from llmc.compiler.trace.export import Trace, trace
from llmc.passes import contract
from llmc.passes.pipeline import canonicalize


def copy_of(done: Trace) -> Trace:
    """Return a copy of a trace for a test to rewrite; `done` stays unchanged."""
    model = done.model.clone()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in (*values, *(value for node in model.graph for value in node.outputs)):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)  # a clone shares them with the original
    return Trace(model, done.parameters, done.tied, done.replaced)


@functools.cache
def keep_translations() -> None:
    """Let torch take the list of onnxscript's translations once. Every trace makes it anew otherwise."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    found = onnxscript_apis.get_torchlib_ops
    onnxscript_apis._module.get_torchlib_ops = functools.cache(found)  # type: ignore[attr-defined]


_traced: dict[tuple[str, str, int], Trace] = {}


def trace_once(config: Any, dtype: str, max_seq_len: int) -> Trace:
    """`trace` for builds that differ in what comes after it: the same model is traced once."""
    key = (config.to_json_string(use_diff=False), dtype, max_seq_len)
    if key not in _traced:
        keep_translations()
        _traced[key] = trace(config, dtype, max_seq_len)
    return copy_of(_traced[key])


def share_traces(patch: pytest.MonkeyPatch) -> None:
    """Let builds share traces, as long as `patch` lasts."""
    patch.setattr(export, "trace", trace_once)


@functools.cache  # callers must not change the graph
def canonical(path: Path) -> tuple[ir.Model, dict[str, TensorRef]]:
    """Return the canonical graph of a checkpoint in fp32, and the checkpoint's tensors."""
    checkpoint = Checkpoint.open(path)
    config = load_config(checkpoint)
    model = trace_once(config, "fp32", choose_context(config, None).max_seq_len).model
    contract.run(model, canonicalize())
    return model, checkpoint.tensors
