"""Trace a Hugging Face causal language model into an ONNX graph, without loading its weights.

The model is made with fake parameters, which have a shape and a dtype but no storage. Modules that llmc knows
are replaced by operators (`intercept.py`). Then `torch.export` and `torch.onnx` export the model. The graph
has the inputs input_ids [1, T] and position_ids [1, T], and no mask. The passes add the KV cache.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common
import onnxscript.optimizer
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmc.compiler.trace import probes
from llmc.compiler.trace.intercept import ATTENTION, intercept
from llmc.compiler.trace.onnx_ops import translation_table
from llmc.compiler.trace.refusal import HINT, reason, untraceable
from llmc.passes import edit
from llmc.passes.parameter import of_tensor, set_parameter
from llmc.runtime.dtypes import BY_NAME
from llmc.runtime.errors import LlmcError, UnsupportedError

OPSET = 23
_EXAMPLE_TOKENS = 7  # any number except 1: the number of tokens is symbolic in the graph


@dataclass(frozen=True)
class Trace:
    """A traced model."""

    model: ir.Model
    #: Name of a parameter -> shape, without parameters that are tied to another one.
    parameters: dict[str, tuple[int, ...]]
    #: Name of a tied parameter -> name of the parameter whose data it shares.
    tied: dict[str, str]
    #: Intercepted operator -> number of modules.
    replaced: dict[str, int]


def trace(config: PreTrainedConfig, dtype: str, max_seq_len: int) -> Trace:
    """Trace the causal language model of `config`.

    dtype: the compute dtype, "fp32", "fp16" or "bf16", whatever the dtype of the checkpoint
    max_seq_len: the number of positions of the rotary tables

    Raises UnsupportedError, naming the module, if the model does something that llmc cannot express.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = _fake_model(config, getattr(torch, BY_NAME[dtype].numpy), fake)
    tied = {alias: name for alias, name in model.all_tied_weights_keys.items() if alias != name}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied}
    try:
        with intercept(model, max_seq_len) as interception, _quiet():
            graph = _export(model, fake)
            probes.attention(interception.attention_calls)
    except LlmcError:
        raise
    except Exception as error:  # the probes run the model's code, which raises many kinds
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedError(
            f"llmc cannot replace the modules of {type(model).__name__}: {message}",
            "set LLMC_TRACEBACK=1 to see where; `llmc zoo list` shows the families that are known to work",
        ) from error
    return Trace(graph, parameters, tied, dict(interception.replaced))


def _fake_model(config: PreTrainedConfig, dtype: torch.dtype, fake: FakeTensorMode) -> PreTrainedModel:
    """Return the model with parameters and persistent buffers without storage: checkpoints hold them.

    Other buffers (rotary frequencies) stay real and fp32.
    """
    register, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def register_fake(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not isinstance(param, FakeTensor):
            with fake:
                param = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=False)
        register(module, name, param)

    def register_fake_buffer(
        module: nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        if persistent and tensor is not None and not isinstance(tensor, FakeTensor):
            with fake:
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
        register_buffer(module, name, tensor, persistent)

    nn.Module.register_parameter = register_fake  # type: ignore[method-assign,assignment]
    nn.Module.register_buffer = register_fake_buffer  # type: ignore[method-assign,assignment]
    try:
        return _from_config(config, dtype).eval()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with llmc's attention, or with its own if its code does not support another."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(
            f"transformers has no causal language model for model_type {config.model_type!r}",
            "llmc compiles text-only causal language models",
        )
    for attention in (ATTENTION, "sdpa", "eager"):  # code older than the interface knows only the last two
        try:
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=dtype, trust_remote_code=False
            )
        except Exception as error:  # model code raises many kinds
            cause = error
    raise UnsupportedError(
        f"transformers cannot make a {config.model_type} model from this config.json: {reason(cause)}",
        HINT,
    ) from cause


class _Logits(nn.Module):
    """(input_ids [1, T], position_ids [1, T]) -> logits [1, T, vocab], without a KV cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def _export(model: PreTrainedModel, fake: FakeTensorMode) -> ir.Model:
    tokens = torch.export.Dim("T", min=2)
    with fake:
        ids = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64)
        positions = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64)
    try:
        with torch.no_grad(), fake:
            exported = torch.export.export(
                _Logits(model),
                (ids, positions),
                dynamic_shapes={"input_ids": {1: tokens}, "position_ids": {1: tokens}},
                strict=False,
            )
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=translation_table(),
        )
    except LlmcError:
        raise
    except Exception as error:  # torch raises many kinds
        raise untraceable(model, error) from error
    assert program is not None
    graph = program.model
    _rename_parameters(graph, model.all_tied_weights_keys)
    onnxscript.optimizer.optimize_ir(graph, should_fold=_fold_only_small)
    onnx_ir.passes.common.IdentityEliminationPass()(graph)
    return graph


def _rename_parameters(graph: ir.Model, tied: dict[str, str]) -> None:
    """Give initializers the checkpoint's names, without the wrapper's prefix, and fake ones a Parameter."""
    for value in list(graph.graph.initializers.values()):
        tensor = value.const_value
        if value.name and value.name.startswith("model."):
            name = value.name.removeprefix("model.")
            value.name = tied.get(name, name)
        if isinstance(getattr(tensor, "raw", None), FakeTensor):
            value.const_value = None
            set_parameter(value, of_tensor(str(value.name), tuple(edit.dims(value))))


def _fold_only_small(node: ir.Node) -> bool | None:
    """Return False for nodes that must not be folded: weights have no data, large tables would be copied."""
    for value in node.inputs:
        if value is not None and value.is_initializer():
            tensor = value.const_value
            if tensor is None or tensor.nbytes > 1 << 16:
                return False
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output and the warnings of the exporter, which are about its internals."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
