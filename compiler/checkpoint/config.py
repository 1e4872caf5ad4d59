"""The model's configuration as transformers understands it."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.recipe import known_families
from llmc.runtime.errors import BuildError, CheckpointError, UnsupportedError


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """transformers' config object for a checkpoint.

    Raises UnsupportedError for what llmc cannot compile and CheckpointError for values that
    transformers refuses. Code that ships with a checkpoint is never run.
    """
    raw = dict(checkpoint.config)
    families = ", ".join(known_families())
    raw.pop(
        "quantization_config", None
    )  # quantize/stored_plan.py reads it; transformers would want a package
    if checkpoint.model_type not in _known_model_types():
        remote = " with code of its own (auto_map)" if "auto_map" in raw else ""
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
    """The bundle's context in tokens: `wanted`, or all that the model was made for.

    Raises BuildError if `wanted` is more than the model's own context.
    """
    own = getattr(config, "max_position_embeddings", None)
    own = own if own and own > 0 else None  # some families write -1 for "no limit"
    if wanted is None:
        if own is None:
            raise BuildError("config.json has no max_position_embeddings", "give --max-seq-len")
        return int(own)
    if own is not None and wanted > own:
        raise BuildError(
            f"--max-seq-len {wanted} is more than the model's context of {own} tokens",
            f"give at most {own}",
        )
    return wanted
