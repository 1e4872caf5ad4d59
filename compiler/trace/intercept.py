"""Replace each module that llmc knows by one operator while a model is traced.

A class name alone is not enough: every operator is compared with the code that it replaces on random numbers,
and the model is refused if they differ (`probes.py`).
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from llmc.compiler.trace import grouped_router, latent_attention, probes, scaled_experts
from llmc.compiler.trace import ops as ops  # registers torch.ops.llmc
from llmc.compiler.trace.refusal import unlike
from llmc.runtime.errors import LlmcError, UnsupportedError

ATTENTION = "llmc"  # the name of llmc's attention implementation in transformers' registry


@dataclass
class Interception:
    """The replacements in a model, which `undo` reverts."""

    #: Operator -> number of modules that it replaces.
    replaced: Counter[str] = field(default_factory=Counter)
    #: The calls of the attention interface during the trace.
    attention_calls: list[probes.AttentionCall] = field(default_factory=list)
    #: Modules that the operator of a module around them computes.
    covered: set[nn.Module] = field(default_factory=set)
    _restore: list[Callable[[], None]] = field(default_factory=list)

    def set_forward(self, module: nn.Module, forward: Callable[..., Any], name: str) -> None:
        """Replace the `forward` of a module. name: the operator, for `replaced`."""
        module.__dict__["forward"] = forward
        self._restore.append(lambda: module.__dict__.pop("forward"))
        self.replaced[name] += 1

    def set_inline_attention(self, module: nn.Module, scale: float, window: int) -> None:
        """Replace the method `_attn` of a module (see `probes.inline_attention`)."""
        layer = self.replaced["inline_attention"]
        attention = torch.ops.llmc.attention

        def attend(query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            _refuse_mask(type(module).__name__, attention_mask)
            return attention(query, key, value, None, scale, 0.0, window, 0, layer).transpose(1, 2), None

        module.__dict__["_attn"] = attend
        self._restore.append(lambda: module.__dict__.pop("_attn"))
        self.replaced["inline_attention"] += 1

    def set_attribute(self, owner: ModuleType, name: str, value: object) -> None:
        """Set an attribute of a Python module."""
        present, original = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)
        self._restore.append(lambda: setattr(owner, name, original) if present else delattr(owner, name))

    def undo(self) -> None:
        """Revert all replacements, the latest first."""
        while self._restore:
            self._restore.pop()()


class _OrderedSet(set[Any]):
    """A set that iterates in the order of insertion.

    The order of strings in a set changes from process to process. Model code that loops over one (Gemma 3)
    would make a different graph each time.
    """

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._order = dict.fromkeys(items)
        super().__init__(self._order)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._order)


_active: list[Interception] = []


@contextmanager
def intercept(model: PreTrainedModel, max_seq_len: int) -> Iterator[Interception]:
    """Make `model` compute with the operators of `ops.py` within the context.

    model: a model that was made with `attn_implementation=ATTENTION`
    max_seq_len: the number of positions of the rotary tables

    Raises UnsupportedError, naming the module, if one differs from its operator or is not supported.
    """
    interception = Interception()
    _active.append(interception)
    try:
        repeats: set[Callable[[torch.Tensor], torch.Tensor]] = set()
        for owner in _python_modules(model):
            interception.set_attribute(owner, "set", _OrderedSet)
        for name, module in model.named_modules():  # a module comes before those inside it
            if module in interception.covered:
                continue
            try:
                repeats |= _intercept_module(name, module, model, interception, max_seq_len)
            except LlmcError:
                raise
            except Exception as error:  # model code that the probes call raises many kinds
                raise unlike(name, module) from error
        if interception.replaced["experts"]:
            _intercept_routers(interception)
        if not interception.replaced["latent_attention"]:  # which rotates by itself
            for repeat in repeats:
                _intercept_apply_rotary(model, interception, repeat)
        if not repeats:
            _intercept_rotary_by_token(model, interception)
        _intercept_masks(model, interception)
        yield interception
    finally:
        _active.remove(interception)
        interception.undo()


def _intercept_module(
    name: str, module: nn.Module, model: PreTrainedModel, interception: Interception, max_seq_len: int
) -> set[Callable[[torch.Tensor], torch.Tensor]]:
    """Replace a module that llmc knows.

    Returns the functions by which a rotary embedding repeats its angles (`probes.RotaryTable.repeat`); for
    other modules an empty set.
    """
    kind = type(module).__name__
    if isinstance(module, nn.Linear) and (type(module) is nn.Linear or probes.linear(module)):
        interception.set_forward(module, _linear(module), "linear")
    elif kind.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        interception.set_forward(module, _rms_norm(module, *probes.rms_norm(name, module)), "rms_norm")
    elif kind.endswith("Norm") and (epsilon := probes.plain_norm(module)) is not None:
        interception.set_forward(module, _plain_norm(epsilon), "rms_norm")
    elif kind.endswith("RotaryEmbedding"):
        tables = probes.rotary_tables(name, module, max_seq_len)
        interception.set_forward(module, _rotary(module, tables), "rotary")
        return {table.repeat for table in tables.values()}
    elif _is_custom_layer_norm(module) and (epsilon := probes.layer_norm(module)) is not None:
        interception.set_forward(module, _layer_norm(module, epsilon), "layer_norm")
    elif scaled_experts.is_scaled(module):
        interception.set_forward(module, scaled_experts.replacement(name, module), "experts")
        interception.covered.add(module.get_submodule("experts"))
    elif kind.endswith("Experts"):
        forward = _experts(module, probes.experts(name, module))
        interception.set_forward(module, forward, "experts")
    elif latent_attention.is_latent(module):
        interception.set_forward(module, latent_attention.replacement(name, module), "latent_attention")
    elif grouped_router.is_grouped(module) and (router := grouped_router.replacement(module)) is not None:
        interception.set_forward(module, router, "router")
    elif hasattr(type(module), "_attn"):
        interception.set_inline_attention(module, *probes.inline_attention(name, module))
    else:
        _refuse(name, module, model)
    return set()


def _refuse(name: str, module: nn.Module, model: PreTrainedModel) -> None:
    """Raise UnsupportedError for a kind of module that llmc cannot compile."""
    if isinstance(module, nn.Conv1d):
        owner = name.rpartition(".")[0]
        mixer = type(model.get_submodule(owner)).__name__
        raise UnsupportedError(
            f"module {owner} ({mixer}) is a recurrent layer: {name} convolves over tokens",
            "llmc has a cache for attention only, not for state-space and other recurrent layers",
        )


def _linear(module: nn.Linear) -> Callable[..., torch.Tensor]:
    # The parameters are read at call time: a captured tensor would lose its checkpoint name.
    return lambda x: torch.ops.llmc.linear(x, module.weight, module.bias)


def _experts(module: nn.Module, form: probes.ExpertsForm) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # The parameters are read at call time, as in `_linear`.
        return form.compute(module, x, ids, weights)

    return forward


def _rms_norm(
    module: nn.Module, epsilon: float, offset: float, rounds_once: bool
) -> Callable[..., torch.Tensor]:
    return lambda x: torch.ops.llmc.rms_norm(x, module.weight, epsilon, offset, rounds_once)


def _plain_norm(epsilon: float) -> Callable[..., torch.Tensor]:
    return lambda x: torch.ops.llmc.rms_norm(x, x.new_ones(x.shape[-1]), epsilon, 0.0, True)


def _is_custom_layer_norm(module: nn.Module) -> bool:
    """Return whether `module` is a LayerNorm that the model's code defines. torch's own needs no help."""
    named = type(module).__name__.endswith("LayerNorm")
    return named and not isinstance(module, nn.LayerNorm) and getattr(module, "weight", None) is not None


def _layer_norm(module: nn.Module, epsilon: float) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        # The parameters are read at call time, as in `_linear`.
        weight, stored_bias = (module._parameters.get(name) for name in ("weight", "bias"))
        assert weight is not None
        width, wide, scale = x.shape[-1:], x.float(), weight.float()
        bias = None if stored_bias is None else stored_bias.float()
        if weight.dim() == 1:
            return nn.functional.layer_norm(wide, width, scale, bias, epsilon).to(x.dtype)
        normal = nn.functional.layer_norm(wide, width, None, None, epsilon) * scale
        return (normal if bias is None else normal + bias).to(x.dtype)

    return forward


class _Angles(tuple[torch.Tensor, torch.Tensor]):
    """Cosines and sines, where a model may expect them as complex numbers in one tensor."""

    def to(self, device: object) -> _Angles:
        """Return the same: a trace has one device."""
        return self


def _rotary(module: nn.Module, tables: dict[str, probes.RotaryTable]) -> Callable[..., Any]:
    for kind, table in tables.items():
        module.register_buffer(f"cos_table{kind}", table.cos, persistent=False)
        module.register_buffer(f"sin_table{kind}", table.sin, persistent=False)

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> _Angles:
        suffix = f"_{layer_type}" if layer_type else ""
        rows = nn.functional.embedding  # row p of a table holds the angles of position p
        cos = rows(position_ids, getattr(module, f"cos_table{suffix}"))
        sin = rows(position_ids, getattr(module, f"sin_table{suffix}"))
        return _Angles((cos.to(x.dtype), sin.to(x.dtype)))

    return forward


def _intercept_routers(interception: Interception) -> None:
    """Replace torch's function `linear`, which routers call with a weight of their own."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.llmc.linear(x, weight, bias)

    interception.set_attribute(nn.functional, "linear", linear)


def _intercept_apply_rotary(
    model: PreTrainedModel, interception: Interception, repeat: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Replace `apply_rotary_pos_emb` in the Python modules that define the model's layers."""
    owners = [owner for owner in _python_modules(model) if hasattr(owner, "apply_rotary_pos_emb")]
    if not owners and _intercept_complex_rotary(model, interception):
        return
    if not owners:
        raise UnsupportedError(
            f"{type(model).__name__} has rotary embeddings but no function `apply_rotary_pos_emb`",
            "llmc does not support the rotary embedding of this architecture",
        )
    for owner in owners:
        if list(inspect.signature(owner.apply_rotary_pos_emb).parameters)[:4] != ["q", "k", "cos", "sin"]:
            raise UnsupportedError(
                f"module {_user_of(owner, model)} rotates queries and keys separately",
                "llmc does not support the rotary embedding of this architecture",
            )
        interleaved = probes.apply_rotary(owner, repeat)

        def apply(
            q: torch.Tensor,
            k: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            unsqueeze_dim: int = 1,
            interleaved: bool = interleaved,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if unsqueeze_dim != 1:
                raise UnsupportedError(
                    f"apply_rotary_pos_emb is called with unsqueeze_dim={unsqueeze_dim}",
                    "llmc supports the layout [batch, heads, tokens, head_dim] only",
                )
            rope = torch.ops.llmc.rope
            return rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)

        interception.set_attribute(owner, "apply_rotary_pos_emb", apply)


def _intercept_complex_rotary(model: PreTrainedModel, interception: Interception) -> bool:
    """Replace `apply_rotary_emb(xq [1, T, H, D], xk, freqs_cis)`, as in Llama 4.

    Returns whether the model has it.
    """
    found = False
    for owner in _python_modules(model):
        function = getattr(owner, "apply_rotary_emb", None)
        if function is None or list(inspect.signature(function).parameters) != ["xq", "xk", "freqs_cis"]:
            continue
        interleaved = probes.complex_rotary(owner)

        def apply(
            xq: torch.Tensor, xk: torch.Tensor, freqs_cis: _Angles, interleaved: bool = interleaved
        ) -> tuple[torch.Tensor, ...]:
            rope = torch.ops.llmc.rope
            return tuple(rope(x.transpose(1, 2), *freqs_cis, interleaved).transpose(1, 2) for x in (xq, xk))

        interception.set_attribute(owner, "apply_rotary_emb", apply)
        found = True
    return found


def _user_of(owner: ModuleType, model: PreTrainedModel) -> str:
    """Return the first attention module that the Python module `owner` defines, as "name (class)"."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    attention = {
        n: k.__name__
        for n, k in kinds.items()
        if k.__module__ == owner.__name__ and "Attention" in k.__name__
    }
    return next((f"{name} ({kind})" for name, kind in attention.items()), owner.__name__)


def _intercept_rotary_by_token(model: PreTrainedModel, interception: Interception) -> None:
    """Replace `apply_rotary_pos_emb(x [1, T, H, D], sin, cos)`, as in GPT-J, if the model has it."""
    for owner in _python_modules(model):
        function = getattr(owner, "apply_rotary_pos_emb", None)
        if function is None or list(inspect.signature(function).parameters)[1:] != ["sin", "cos"]:
            continue
        interleaved = probes.apply_rotary_by_token(owner)

        def apply(
            x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, interleaved: bool = interleaved
        ) -> torch.Tensor:
            return torch.ops.llmc.rope(x.transpose(1, 2), cos, sin, interleaved).transpose(1, 2)

        interception.set_attribute(owner, "apply_rotary_pos_emb", apply)


def _intercept_masks(model: PreTrainedModel, interception: Interception) -> None:
    """Remove causal masks, which llmc's attention implies, and refuse position biases, which it lacks."""
    config, layers = model.config, iter(range(1 << 20))

    def no_mask(*args: Any, **kwargs: Any) -> None:
        return None

    def alibi(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"{type(model).__name__} adds position biases to the attention scores (ALiBi)",
            "llmc supports rotary and learned positions only",
        )

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        _refuse_mask(type(model).__name__, attn_mask)
        if not is_causal:
            raise UnsupportedError(
                f"{type(model).__name__} uses attention that is not causal",
                "llmc does not support this attention yet",
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        attended = torch.ops.llmc.attention(query, key, value, None, scale, 0.0, 0, 0, next(layers))
        return attended.transpose(1, 2)

    for owner in _python_modules(model):
        for name in [name for name in vars(owner) if "alibi" in name]:
            interception.set_attribute(owner, name, alibi)
        if config._attn_implementation != ATTENTION and hasattr(owner, "create_causal_mask"):
            interception.set_attribute(owner, "create_causal_mask", no_mask)
    if config._attn_implementation == "sdpa":
        name = "scaled_dot_product_attention"
        interception.set_attribute(nn.functional, name, scaled_dot_product_attention)


def _refuse_mask(where: str, mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise UnsupportedError(
            f"{where} uses a custom attention mask", "llmc does not support this attention yet"
        )


def _python_modules(model: PreTrainedModel) -> list[ModuleType]:
    """Return the Python modules that define the model's layers, without torch's."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    return [sys.modules[name] for name in names if not name.startswith("torch.")]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface with `ops.attention`.

    query, key, value: [1, heads, T, head_dim]

    Returns [1, T, heads, head_dim], and None for the attention weights.
    """
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    refusals = {
        "a custom attention mask": attention_mask is not None,
        "attention that is not causal": not kwargs.get("is_causal", getattr(module, "is_causal", True)),
    }
    for what, refused in refusals.items():
        if refused:
            raise UnsupportedError(f"{where} uses {what}", "llmc does not support this attention yet")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    sinks = kwargs.get("s_aux")
    of_sinks = next((name for name, parameter in module.named_parameters() if parameter is sinks), "")
    if sinks is not None and not of_sinks:
        raise UnsupportedError(
            f"{where} computes its attention sinks", "llmc supports sinks that are a parameter of the module"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    window, chunk = int(sliding_window or 0), _chunk(module, layer)
    call = probes.AttentionCall(module, scale, float(softcap or 0.0), window, chunk, of_sinks)
    _active[-1].attention_calls.append(call)
    attended = torch.ops.llmc.attention(
        query, key, value, sinks, call.scale, call.softcap, window, chunk, layer
    )
    return attended, None


def _chunk(module: nn.Module, layer: int) -> int:
    """Return the positions of a chunk for attention in chunks; 0 for other attention.

    Models pass chunks to their layers in the mask, which llmc's attention does not get. So the configuration
    tells which layers have them.
    """
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    if layer >= len(kinds) or kinds[layer] != "chunked_attention":
        return 0
    return int(getattr(config, "attention_chunk_size", None) or 0)


# The name is not in transformers' mask registry too, so that transformers makes no masks for it.
AttentionInterface.register(ATTENTION, _attention)
