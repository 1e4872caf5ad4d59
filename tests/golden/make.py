"""Makes a frozen bundle; run once per format version, then never again.

    python tests/golden/make.py tests/golden/format-1                    # for the CPU
    python tests/golden/make.py tests/golden/format-2 tensorrt-rtx 89    # for a GPU
    python tests/golden/make.py tests/golden/format-3                    # with sampling defaults
    python tests/golden/make.py tests/golden/format-4 cpu "" 2           # for two ranks
    python tests/golden/make.py tests/golden/format-5 tensorrt-rtx 89 1 2    # for two stages on GPUs
    python tests/golden/make.py tests/golden/format-6 cpu "" 1 1 deepseek_v3     # with latent attention
    python tests/golden/make.py tests/golden/format-7 cpu "" 1 1 llama4_text     # with attention in chunks

Writes DIR.llmc and DIR.json: the tokens that transformers generates greedily from a prompt. The sampling
defaults came with format 3. The repetition penalty among them changes these tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler import zoo
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest, parse_sms

PROMPT = [65, 32, 104, 101, 110]
NEW_TOKENS = 40
SAMPLING = {"do_sample": False, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2}

DEEPSEEK = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "architectures": ["DeepseekV3ForCausalLM"],
}

LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 12,
    "floor_scale": 8,
    "no_rope_layers": [1, 0],
    "architectures": ["Llama4ForCausalLM"],
}
FAMILIES = {"llama": {}, "deepseek_v3": DEEPSEEK, "llama4_text": LLAMA4}


def main(
    name: Path, target: str = "cpu", sms: str = "", tp: str = "1", pp: str = "1", family: str = "llama"
) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 259,
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    }
    config = AutoConfig.for_model(family, **sizes | FAMILIES[family])
    with TemporaryDirectory() as directory:
        source = Path(directory) / "golden"
        config.save_pretrained(source)
        zoo.write_weights(source, zoo._weights(source), "float32", seed=1)
        settings = json.loads((source / "config.json").read_text())
        zoo._write_tokenizer(source, zoo._entry("llama-tiny"), settings)
        generation = SAMPLING | {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 259}
        (source / "generation_config.json").write_text(json.dumps(generation))
        output = name.with_suffix(".llmc")
        ranks = {"tp": int(tp), "pp": int(pp)}
        compile_model(BuildRequest(str(source), output, target=target, sms=parse_sms(sms), **ranks))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokens = model.generate(
            torch.tensor([PROMPT]), do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
    expected = {"prompt": PROMPT, "tokens": tokens[0, len(PROMPT) :].tolist()}
    name.with_suffix(".json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
