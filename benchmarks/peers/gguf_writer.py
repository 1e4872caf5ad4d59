"""Write a Qwen3 checkpoint as GGUF in bf16, without a vocabulary: the benchmark uses token ids.

The file is that of llama.cpp's convert_hf_to_gguf.py, which is not on PyPI, without the vocabulary. The names
of tensors and keys come from the `gguf` package. Qwen3 needs no permutation of q and k.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write the file `target`. Raises SystemExit for a checkpoint that is not Qwen3 in bf16."""
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "qwen3":
        raise SystemExit(f"only qwen3 checkpoints become GGUF here, not {config['model_type']}")
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, array in _tensors(path):
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            wanted = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if wanted is None:
                raise SystemExit(f"llama.cpp has no name for {name}")
            if array.ndim == 1:  # norms are fp32 in GGUF
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
