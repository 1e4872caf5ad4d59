"""Mixtures of experts whose router scales the input of the chosen expert (Llama 4).

Such a block computes every expert for every token, with inputs that are zero where an expert was not chosen.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmc.compiler.trace import ops as ops  # registers torch.ops.llmc
from llmc.compiler.trace.probes import close, draw
from llmc.runtime.errors import UnsupportedError

_PARTS = ("experts", "router", "shared_expert")
_MATRICES = ("gate_up_proj", "down_proj")


def is_scaled(module: nn.Module) -> bool:
    """Return whether `module` looks like such a block: its experts do not get the router's choice."""
    if set(module._modules) != set(_PARTS):
        return False
    experts = module.get_submodule("experts")
    taken = list(inspect.signature(type(experts).forward).parameters)
    return len(taken) == 2 and set(experts._parameters) == set(_MATRICES)


def replacement(name: str, module: nn.Module) -> Callable[..., Any]:
    """Return the `forward` that computes `module` with `ops.experts`.

    name: the module's name, for errors

    Raises UnsupportedError if the module chooses several experts for a token, or computes something else.
    """
    chosen = getattr(module, "top_k", None)
    if chosen != 1:
        raise UnsupportedError(
            f"module {name} ({type(module).__name__}) scales the inputs of {chosen} experts for each token",
            "llmc supports one expert for each token where the router scales its input",
        )
    probe = _probe(module)
    x = draw(1, 12, _WIDTH)
    with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
        expected, _ = type(module).forward(probe, x)
        for activation in ("silu", "gelu"):
            if close(_compute(probe, x, activation)[0], expected):
                return lambda x, activation=activation: _compute(module, x, activation)
    raise UnsupportedError(
        f"module {name} ({type(module).__name__}) is a mixture of experts that computes something else than "
        "llmc's",
        "llmc supports routers that scale the input of one expert by the sigmoid of its score",
    )


def _compute(module: Any, x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [T, D] of the block and the logits [T, E] of its router."""
    # The parameters are read at call time: a captured tensor would lose its checkpoint name.
    x = x.reshape(-1, x.shape[-1])
    logits = torch.ops.llmc.linear(x, module.router.weight, module.router.bias)
    score, ids = torch.topk(logits, 1, dim=1)
    scaled = x * torch.sigmoid(score.float()).to(x.dtype)
    one = torch.softmax(score, dim=-1)  # of a single number
    experts = module.experts
    matrices = (experts.gate_up_proj, experts.down_proj)
    routed = torch.ops.llmc.experts(scaled, ids, one, *matrices, None, None, activation, True, 0.0, 0.0)
    return module.shared_expert(x) + routed, logits


_EXPERTS, _WIDTH, _INNER = 3, 8, 6


def _probe(module: nn.Module) -> nn.Module:
    """Return a small copy of the block with random parameters."""
    probe = copy.copy(module)
    probe._modules = dict(module._modules)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "experts": {"gate_up_proj": (_EXPERTS, _WIDTH, 2 * _INNER), "down_proj": (_EXPERTS, _INNER, _WIDTH)},
        "router": {"weight": (_EXPERTS, _WIDTH)},
    }
    sizes = {
        "num_experts": _EXPERTS,
        "hidden_size": _WIDTH,
        "hidden_dim": _WIDTH,
        "in_features": _WIDTH,
        "out_features": _EXPERTS,
        "intermediate_size": _INNER,
        "expert_dim": _INNER,
    }
    for part, parameters in shapes.items():
        small = copy.copy(module._modules[part])
        assert small is not None
        small._parameters = {
            key: nn.Parameter(draw(*shape) / 2, requires_grad=False) for key, shape in parameters.items()
        } | {key: None for key, value in small._parameters.items() if value is None}
        probe._modules[part] = small
    shared = nn.Linear(_WIDTH, _WIDTH, bias=False)
    shared._parameters["weight"] = nn.Parameter(draw(_WIDTH, _WIDTH) / 2, requires_grad=False)
    probe._modules["shared_expert"] = shared
    for owner in (probe, *(probe._modules[part] for part in shapes)):
        for key, size in sizes.items():
            if key in vars(owner):
                setattr(owner, key, size)
    return probe
