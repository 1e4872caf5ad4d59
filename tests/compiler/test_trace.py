"""Tracing: the recorded graph, and modules that differ from llmc's operators are refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.falcon import modeling_falcon
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from llmc.compiler.trace import probes
from llmc.compiler.trace.export import trace
from llmc.compiler.trace.intercept import ATTENTION, intercept
from llmc.passes import contract
from llmc.passes.pipeline import canonicalize
from llmc.runtime.errors import UnsupportedError

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


def test_trace_has_no_weights_and_one_node_per_module() -> None:
    traced = trace(LlamaConfig(**TINY, tie_word_embeddings=True), "fp32", 128)
    counts = Counter(node.op_type for node in traced.model.graph)
    assert counts["TracedLinear"] == 15
    assert counts["TracedRMSNorm"] == 5
    assert counts["TracedRope"] == 4
    assert counts["TracedAttention"] == 2
    assert traced.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    weights = {n: v for n, v in traced.model.graph.initializers.items() if n.endswith("weight")}
    assert all(value.const_value is None for value in weights.values())
    assert weights.keys() == traced.parameters.keys()
    assert "lm_head.weight" not in weights


def test_parameters_have_the_names_and_shapes_of_the_real_model() -> None:
    config = LlamaConfig(**TINY, tie_word_embeddings=False)
    real = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in real.named_parameters()}
    assert trace(config, "fp32", 128).parameters == expected


def test_tracing_restores_transformers() -> None:
    before = modeling_llama.apply_rotary_pos_emb
    register = nn.Module.register_parameter
    trace(LlamaConfig(**TINY), "fp32", 128)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert "set" not in vars(modeling_llama)
    assert nn.Module.register_parameter is register


@pytest.mark.slow
def test_graph_does_not_depend_on_the_hash_seed() -> None:
    """Gemma 3 computes its rotary tables in a loop over a set of strings."""
    program = """
from transformers import AutoConfig
from llmc.compiler.trace.export import trace
from llmc.compiler.zoo import zoo_config
model = trace(AutoConfig.for_model(**zoo_config("gemma3-tiny")), "fp32", 128).model
print([(node.op_type, node.name, [v and v.name for v in node.inputs]) for node in model.graph])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2, 3)
    ]
    graphs = [process.communicate()[0] for process in processes]
    assert "TracedAttention" in graphs[0]
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_intercepted_model_equals_the_original(family: str) -> None:
    root = Path(__file__).parents[2] / "model_zoo" / family / "tiny.json"
    torch.manual_seed(0)
    eager, ours = (
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(root), attn_implementation=name, dtype=torch.float32
        ).eval()
        for name in ("eager", ATTENTION)
    )
    ours.load_state_dict(eager.state_dict())
    config = eager.config
    ids = torch.randint(0, config.vocab_size, (1, 60))
    positions = torch.arange(60)[None]
    with torch.no_grad(), intercept(ours, 128):
        got = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    with torch.no_grad():
        expected = eager(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (got - expected).abs().max() < 1e-5


def test_norm_other_than_rms_norm_is_refused() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean(-1, keepdim=True)) * self.weight

    with pytest.raises(UnsupportedError, match=r"module layers\.3\.norm \(OddRMSNorm\)"):
        probes.rms_norm("layers.3.norm", OddRMSNorm())


def test_probe_distinguishes_gemma_and_llama_norms() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    assert probes.rms_norm("a", modeling_llama.LlamaRMSNorm(16, eps=1e-5)) == (1e-5, 0.0, False)
    assert probes.rms_norm("b", Gemma3RMSNorm(16, eps=1e-6)) == (1e-6, 1.0, True)
    assert probes.rms_norm("c", Olmo2RMSNorm(16, eps=1e-6)) == (1e-6, 0.0, True)


def test_dynamic_rope_is_refused_beyond_its_original_context() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**TINY | {"max_position_embeddings": 64}, rope_parameters=parameters)
    with pytest.raises(UnsupportedError, match="dynamic rope the angles depend on the length") as caught:
        trace(config, "fp32", 128)
    assert "--max-seq-len" in caught.value.hint
    trace(config, "fp32", 64)  # up to the original context the angles are fixed


def test_longrope_is_refused_beyond_its_original_context() -> None:
    from transformers import Phi3Config

    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 2.0,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Phi3Config(**TINY, **tokens, rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(UnsupportedError, match="longrope") as caught:
        trace(config, "fp32", 128)
    assert "64" in caught.value.hint
    trace(config, "fp32", 64)


def test_unknown_rotation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    with pytest.raises(UnsupportedError, match="neither of the two known rotations"):
        trace(LlamaConfig(**TINY), "fp32", 128)


def test_differing_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return output * 2, weights

    original = modeling_qwen3.eager_attention_forward
    monkeypatch.setattr(modeling_qwen3, "eager_attention_forward", doubled)
    with pytest.raises(UnsupportedError, match="attention of Qwen3Attention computes something else"):
        trace(AutoConfig.for_model("qwen3", **TINY, head_dim=16), "fp32", 128)


GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}


def test_attention_that_computes_without_its_sinks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", modeling_qwen3.eager_attention_forward)
    with pytest.raises(UnsupportedError, match="attention of GptOssAttention computes something else"):
        trace(AutoConfig.for_model("gpt_oss", **TINY | GPT_OSS), "fp32", 128)


def test_differing_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)

    monkeypatch.setattr(modeling_gpt_oss.GptOssExperts, "_apply_gate", unclamped)
    message = r"module model\.layers\.0\.mlp\.experts .* is a mixture of experts that computes something else"
    with pytest.raises(UnsupportedError, match=message):
        trace(AutoConfig.for_model("gpt_oss", **TINY | GPT_OSS), "fp32", 128)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"model_type": "mamba", "state_size": 4, "num_hidden_layers": 1}, "Mamba"),
        ({"model_type": "bloom"}, "adds position biases to the attention scores"),
        ({"model_type": "falcon", "alibi": True}, "adds position biases to the attention scores"),
        (
            {"model_type": "gemma4_text", "head_dim": 16, "vocab_size_per_layer_input": 96},
            r"module model\.layers\.0\.self_attn \(Gemma4TextAttention\) rotates queries and keys separately",
        ),
        (
            {"model_type": "openai-gpt"},
            r"module transformer\.h\.0\.attn: the attention of Attention computes",
        ),
        ({"model_type": "rwkv"}, r"cannot trace .*Rwkv.* depends on the number of tokens"),
        ({"model_type": "xlstm", "num_heads": 2}, "multihead_norm .* takes other inputs"),
        (
            {"model_type": "diffllama"},
            r"operator ConstantOfShape of module model\.layers\.0\.self_attn\.groupnorm is outside",
        ),
    ],
)
def test_unsupported_architectures_are_refused(settings: dict[str, Any], complaint: str) -> None:
    config = AutoConfig.for_model(**TINY | settings)
    with pytest.raises(UnsupportedError, match=complaint):
        contract.run(trace(config, "fp32", 128).model, canonicalize())


def test_attention_of_older_code_has_its_scale_and_window() -> None:
    config = AutoConfig.for_model(
        "gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=24
    )
    local = modeling_gpt_neo.GPTNeoSelfAttention(config, "local", 1)
    assert probes.inline_attention("attn", modeling_gpt_neo.GPTNeoSelfAttention(config, "global", 0)) == (
        1.0,
        0,
    )
    assert probes.inline_attention("attn", local) == (1.0, 24)
    config = AutoConfig.for_model("gptj", n_embd=64, n_head=4, rotary_dim=8)
    assert probes.inline_attention("attn", modeling_gptj.GPTJAttention(config, 0)) == (0.25, 0)


def test_attention_of_older_code_that_computes_something_else_is_refused() -> None:
    class Doubled(modeling_gptj.GPTJAttention):
        def _attn(self, *args: Any) -> Any:
            output, weights = super()._attn(*args)
            return output * 2, weights

    config = AutoConfig.for_model("gptj", n_embd=64, n_head=4, rotary_dim=8)
    with pytest.raises(
        UnsupportedError, match=r"module h\.0\.attn: the attention of Doubled computes something"
    ):
        probes.inline_attention("h.0.attn", Doubled(config, 0))


def test_probe_distinguishes_layer_norms() -> None:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    class OtherLayerNorm(CohereLayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert probes.layer_norm(CohereLayerNorm(16, eps=1e-6)) == 1e-6
    assert probes.layer_norm(CohereLayerNorm((2, 16), eps=1e-5)) == 1e-5
    assert probes.layer_norm(OtherLayerNorm(16)) is None


def test_probe_distinguishes_linear_layers() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class ScaledLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert probes.linear(FalconLinear(4, 2))
    assert not probes.linear(ScaledLinear(4, 2))


def test_tracing_restores_torch_and_causal_masks() -> None:
    before = nn.functional.scaled_dot_product_attention, modeling_falcon.create_causal_mask
    trace(
        AutoConfig.for_model("falcon", hidden_size=64, num_hidden_layers=1, num_attention_heads=4), "fp32", 32
    )
    assert before == (nn.functional.scaled_dot_product_attention, modeling_falcon.create_causal_mask)


def test_rotary_tables_equal_transformers(checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama-tiny"))
    rotary = modeling_llama.LlamaRotaryEmbedding(config)
    cos, _ = rotary(torch.zeros(1, 1, 1), torch.tensor([[0, 5, 100]]))
    table = probes.rotary_tables("rotary_emb", rotary, 128)[""].cos
    assert np.allclose(table[[0, 5, 100]], cos[0, :, : table.shape[1]])
