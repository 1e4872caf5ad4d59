"""Multi-head latent attention and routers with groups: what the trace replaces, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from llmc.compiler.trace.export import trace
from llmc.compiler.zoo import zoo_config
from llmc.passes import contract
from llmc.passes.geometry import read_geometry
from llmc.passes.pipeline import canonicalize
from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.errors import UnsupportedError

V3 = zoo_config("deepseek-v3-tiny")


def config(**changes: Any) -> Any:
    settings = V3 | changes
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def test_the_cache_holds_one_latent_vector_for_each_token() -> None:
    traced = trace(config(num_hidden_layers=1, first_k_dense_replace=1), "fp32", 64)
    assert traced.replaced["latent_attention"] == 1
    contract.run(traced.model, canonicalize())
    geometry = read_geometry(traced.model)
    assert [(x.num_kv_heads, x.head_dim, x.v_head_dim) for x in geometry.layers] == [(1, 32 + 16, 0)]
    assert block_bytes(geometry, "fp32") == 32 * (32 + 16) * 4


def test_latent_attention_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: Any, latent: torch.Tensor, rotated: torch.Tensor) -> Any:
        key, value = original(self, latent, rotated)
        return key, 2 * value

    original = modeling_deepseek_v3.DeepseekV3Attention.expand_kv
    monkeypatch.setattr(modeling_deepseek_v3.DeepseekV3Attention, "expand_kv", doubled)
    message = (
        r"module model\.layers\.0\.self_attn \(DeepseekV3Attention\) is multi-head latent attention that"
    )
    with pytest.raises(UnsupportedError, match=message):
        trace(config(), "fp32", 64)


def test_latent_attention_with_another_layer_is_refused() -> None:
    """Its indexer chooses all of few tokens, so that a comparison of few finds no difference."""
    sizes = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 32}
    with pytest.raises(UnsupportedError, match=r"Attention\) is multi-head latent attention that computes"):
        trace(config(model_type="deepseek_v32", **sizes), "fp32", 64)


def test_a_router_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def smallest(self: Any, x: torch.Tensor) -> Any:
        logits, weights, ids = original(self, -x)
        return logits, weights, ids

    original = modeling_deepseek_v3.DeepseekV3TopkRouter.forward
    monkeypatch.setattr(modeling_deepseek_v3.DeepseekV3TopkRouter, "forward", smallest)
    with pytest.raises(
        UnsupportedError, match=r"of module model\.layers\.1\.mlp\.gate is outside the operators"
    ):
        contract.run(trace(config(), "fp32", 64).model, canonicalize())
