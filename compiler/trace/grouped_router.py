"""Routers that choose experts of a few groups: DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).

Such a router gives each expert a score, keeps the groups with the best experts, and chooses among theirs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmc.compiler.trace import ops as ops  # registers torch.ops.llmc
from llmc.compiler.trace.probes import close, draw

_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class RouterForm:
    """How a router computes."""

    #: Whether scores are sigmoids of the logits. Otherwise they are their softmax.
    sigmoid: bool
    #: The number of experts whose scores make up that of their group.
    scored: int
    #: Whether the weights of a token are divided by their sum.
    normalized: bool

    def compute(self, module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits [T, E], the weights [T, K] and the experts, int64 [T, K]."""
        x = x.reshape(-1, x.shape[-1])
        logits = torch.ops.llmc.linear(x.float(), module.weight.float(), None)
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        bias = module._buffers.get(_BIAS)
        weights, ids = torch.ops.llmc.grouped_top_k(
            scores,
            scores if bias is None else scores + bias,
            module.num_group,
            module.topk_group,
            self.scored,
            module.top_k,
        )
        if self.normalized:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * module.routed_scaling_factor, ids


def is_grouped(module: nn.Module) -> bool:
    """Return whether `module` looks like a router with groups."""
    kept = getattr(module, "topk_group", None)
    return type(module).__name__.endswith("Router") and isinstance(kept, int)


def replacement(module: nn.Module) -> Callable[..., Any] | None:
    """Return the `forward` that computes `module` with `ops.grouped_top_k`; None if it computes otherwise."""
    form = _form(module)
    # The parameters are read at call time: a captured tensor would lose its checkpoint name.
    return None if form is None else lambda x: form.compute(module, x)


def _form(module: Any) -> RouterForm | None:
    experts, width = module.weight.shape
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(draw(experts, width) * width**-0.5, requires_grad=False)}
    probe._buffers = {name: draw(*buffer.shape) * 0.1 for name, buffer in module._buffers.items()}
    if set(module._parameters) != set(probe._parameters) or set(probe._buffers) - {_BIAS}:
        return None
    x = draw(1, 64, width)
    with (
        torch.no_grad(),
        contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError),
    ):
        _, weights, ids = type(module).forward(probe, x)
        wanted = torch.zeros(64, experts).scatter(1, ids, weights)
        for choices in itertools.product((False, True), (1, 2), (False, True)):
            form = RouterForm(*choices)
            with contextlib.suppress(RuntimeError):  # a group of one expert has no two
                _, weights, ids = form.compute(probe, x)
                if close(torch.zeros(64, experts).scatter(1, ids, weights), wanted):
                    return form
    return None
