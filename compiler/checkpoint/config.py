"""The model's configuration as transformers understands it."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.recipe import known_families
from llmc.runtime.errors import BuildError, CheckpointError, UnsupportedError


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return transformers' config object for a checkpoint. Code that ships with a checkpoint is never run.

    Raises UnsupportedError for a model that llmc cannot compile, CheckpointError for values that transformers
    refuses.
    """
    raw = dict(checkpoint.config)
    families = ", ".join(known_families())
    # checkpoint/prequantized reads it; transformers would need the package that wrote the checkpoint.
    raw.pop("quantization_config", None)
    if checkpoint.model_type not in _known_model_types():
        remote = " with custom code (auto_map)" if "auto_map" in raw else ""
        raise UnsupportedError(
            f"transformers does not know the architecture {checkpoint.model_type!r}{remote}",
            f"families that llmc is tested with: {families}",
        )
    try:
        config = AutoConfig.for_model(**raw)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines())
        raise CheckpointError(
            f"transformers refuses {checkpoint.path / 'config.json'}: {reason}",
            "compare it with the config.json of the original model",
        ) from error
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedError(
            "the model attends in both directions (use_bidirectional_attention)",
            "llmc compiles causal language models",
        )
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedError(
            f"model_type {checkpoint.model_type!r} is not a text-only language model",
            f"families that llmc is tested with: {families}",
        )
    heads, kv_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if heads and kv_heads and heads % kv_heads:
        raise CheckpointError(
            f"config.json has {heads} attention heads, which {kv_heads} key/value heads cannot share evenly",
            "compare it with the config.json of the original model",
        )
    return config


def _known_model_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return set(CONFIG_MAPPING_NAMES)


def context_length(config: PreTrainedConfig, wanted: int | None) -> int:
    """Return the bundle's context length in tokens: `wanted`, or the model's if it is None.

    Raises BuildError if `wanted` is more than the model's context length.
    """
    limit = getattr(config, "max_position_embeddings", None)
    limit = limit if limit and limit > 0 else None  # some families write -1 for "no limit"
    if wanted is None:
        if limit is None:
            raise BuildError(
                "config.json has no max_position_embeddings", "give --max-seq-len", "max_seq_len"
            )
        return int(limit)
    if limit is not None and wanted > limit:
        raise BuildError(
            f"--max-seq-len {wanted} is more than the model's context of {limit} tokens",
            f"give at most {limit}",
            "max_seq_len",
        )
    return wanted
