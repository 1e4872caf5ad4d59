"""Load a checkpoint's configuration with transformers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmc.compiler.checkpoint.checkpoint import CONFIG, Checkpoint
from llmc.compiler.checkpoint.recipe import known_families
from llmc.runtime.errors import CheckpointError, UnsupportedError

_ORIGINAL = "compare it with the config.json of the original model"
# Settings that do not describe the model: those of a run, of a classifier, of other files and of the
# checkpoint's code. transformers makes one label for each of `num_labels`, however many they are.
_DROPPED = frozenset((
    "quantization_config",  # checkpoint/prequantized reads it
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "transformers_weights", "_name_or_path",
    "num_labels", "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states",
))  # fmt: skip
# Sizes that must be positive numbers. A list is accepted: some families have one size for each layer.
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return transformers' config object for a checkpoint. Code that ships with a checkpoint is never run.

    For a multimodal model, it is the config of its language model. `load_wrapper` returns that of the whole.
    Raises UnsupportedError for a model that llmc cannot compile, CheckpointError for values that transformers
    refuses or that are not positive numbers.
    """
    whole, config = _read_configs(checkpoint)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(config, "num_hidden_layers"):
        raise _no_language_model(whole, config, _code_of(checkpoint.config))
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedError(
            "the model attends in both directions (use_bidirectional_attention)",
            "llmc compiles causal language models",
        )
    _check_sizes(config)
    return config


def load_wrapper(checkpoint: Checkpoint) -> PreTrainedConfig | None:
    """Return the config of the multimodal model around the language model; None if there is none.

    Raises as `load_config` does.
    """
    whole, config = _read_configs(checkpoint)
    return None if config is whole else whole


def _read_configs(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Return the configuration, and that of its language model, which may be the same object."""
    model_type, code = checkpoint.model_type, _code_of(checkpoint.config)
    if model_type not in CONFIG_MAPPING_NAMES:
        needs_code = f": it needs the checkpoint's own code{code}, which llmc never runs" if code else ""
        raise UnsupportedError(
            f"transformers does not know the architecture {model_type!r}{needs_code}", _families()
        )
    try:
        settings = PreTrainedConfig._decode_special_floats(_model_settings(checkpoint.config))
        whole = AutoConfig.for_model(**settings)
        config = whole.get_text_config()
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"text_config is {config!r}")
    except Exception as error:  # configurations raise many kinds; the values are the checkpoint's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"transformers refuses {checkpoint.path / CONFIG}: {reason[:500]}", _ORIGINAL
        ) from error
    return whole, config


def _families() -> str:
    return f"families that llmc is tested with: {', '.join(known_families())}"


def _model_settings(value: Any) -> Any:
    """Return a copy of a configuration without the settings that do not describe the model."""
    if isinstance(value, dict):
        return {key: _model_settings(item) for key, item in value.items() if key not in _DROPPED}
    return [_model_settings(item) for item in value] if isinstance(value, list) else value


def _code_of(config: dict[str, Any]) -> str:
    """Return " (auto_map: modeling_x.XForCausalLM)" for a checkpoint with code of its own, else ""."""
    auto_map = config.get("auto_map")
    if not auto_map:
        return ""
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return f" (auto_map: {named})" if isinstance(named, str) else " (auto_map)"


def _no_language_model(whole: PreTrainedConfig, config: PreTrainedConfig, code: str) -> UnsupportedError:
    fact = f"transformers has no causal language model for model_type {whole.model_type!r}"
    if code:
        fact += f": it needs the checkpoint's own code{code}, which llmc never runs"
    elif config is not whole:
        fact += f", whose language model is of model_type {config.model_type!r}"
    return UnsupportedError(fact, f"llmc compiles causal language models; {_families()}")


def _check_sizes(config: PreTrainedConfig) -> None:
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, (int, float, str)) and not (type(size) is int and 0 < size < 2**31):
            raise CheckpointError(f"{CONFIG} has {name} {size!r}, which must be a positive number", _ORIGINAL)
    heads, kv_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if type(heads) is int and type(kv_heads) is int and heads % kv_heads:
        raise CheckpointError(
            f"{CONFIG} has {heads} attention heads, which {kv_heads} key/value heads cannot share evenly",
            _ORIGINAL,
        )
