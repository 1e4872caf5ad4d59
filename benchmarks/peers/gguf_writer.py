"""Write a Qwen3 or Llama checkpoint as GGUF in bf16, without a vocabulary: the benchmark uses token ids.

The file is that of llama.cpp's convert_hf_to_gguf.py, which is not on PyPI, without the vocabulary. The names
of tensors and keys come from the `gguf` package.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
from llama_rope import frequency_divisors, interleave_pairs, rope_parameters

ARCHITECTURES = {"qwen3": gguf.MODEL_ARCH.QWEN3, "llama": gguf.MODEL_ARCH.LLAMA}


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write the file `target`. Raises SystemExit for a checkpoint that is not Qwen3 or Llama in bf16."""
    config = json.loads((checkpoint / "config.json").read_text())
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise SystemExit(f"only {known} checkpoints become GGUF here, not {model_type}")
    architecture = ARCHITECTURES[model_type]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_parameters(config)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if (model_type, rope["rope_type"]) == ("llama", "llama3"):
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]
        writer.add_tensor(f"{name}.weight", frequency_divisors(rope, head_dim))
    elif rope["rope_type"] != "default":
        raise SystemExit(f"{model_type} with rope of type {rope['rope_type']} does not become GGUF here")
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    interleaved = {"q_proj": heads, "k_proj": kv_heads} if model_type == "llama" else {}
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, array in _tensors(path):
            if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
                continue
            wanted = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if wanted is None:
                raise SystemExit(f"llama.cpp has no name for {name}")
            if rotated_heads := interleaved.get(name.split(".")[-2]):
                array = interleave_pairs(array, rotated_heads)
            if array.ndim == 1:  # norms and biases are fp32 in GGUF
                widened = (array.astype(np.uint32) << 16).view(np.float32)
                writer.add_tensor(wanted, widened)
            else:
                raw = array.view(np.uint8)
                writer.add_tensor(wanted, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> list[tuple[str, np.ndarray]]:
    """Return the names and the bf16 tensors of a safetensors file, as uint16."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    header.pop("__metadata__", None)
    if other := {entry["dtype"] for entry in header.values()} - {"BF16"}:
        raise SystemExit(f"{path.name} holds {', '.join(sorted(other))}; only BF16 is read here")
    tensors = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors.append((name, data[begin:end].view(np.uint16).reshape(entry["shape"])))
    return tensors
