"""The sampling defaults of a checkpoint, as transformers' `generate` applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.runtime.bundle.manifest import Sampling
from llmc.runtime.errors import CheckpointError, RequestError
from llmc.runtime.sampling import SamplingParams

FILE = "generation_config.json"
_KEPT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_DEFAULT_TOP_K = 50  # transformers samples from 50 tokens where the file has no top_k
_MAX_TOP_K = 2**31 - 1  # more than any vocabulary has
# Settings that change the tokens transformers chooses and that llmc lacks -> the value that turns them off.
# null turns them off too.
_OTHERS = {
    "num_beams": 1,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_length": 0,
    "min_new_tokens": 0,
}


def sampling_defaults(checkpoint: Checkpoint) -> Sampling | None:
    """Return the sampling defaults in generation_config.json, or None if it sets none.

    Values that the file lacks are transformers' defaults. Raises CheckpointError for an invalid value.
    """
    config = checkpoint.generation_config
    settings = {name: config[name] for name in _KEPT if config.get(name) is not None}
    do_sample = config.get("do_sample")
    if do_sample is None and not settings:
        return None
    if not isinstance(do_sample, bool | None):
        raise _invalid(checkpoint, f"do_sample is {do_sample!r}", "do_sample must be true or false")
    if settings.get("top_k") == -1:  # other tools write -1 for "off"
        settings["top_k"] = 0
    values: dict[str, Any] = {"temperature": 1.0, "top_k": _DEFAULT_TOP_K if do_sample else 0} | settings
    try:
        params = SamplingParams(**values)
        numbers = {name: float(getattr(params, name)) for name in _KEPT if name != "top_k"}
    except (RequestError, OverflowError) as error:
        message, hint = (error.message, error.hint) if isinstance(error, RequestError) else (str(error), "")
        raise _invalid(checkpoint, message, hint) from error
    return Sampling(do_sample=bool(do_sample), top_k=min(params.top_k, _MAX_TOP_K), **numbers)


def not_followed(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the names of settings in generation_config.json that are in effect but that llmc lacks."""
    for name, off in _OTHERS.items():
        value = checkpoint.generation_config.get(name)
        if value is not None and value != off and value != []:
            yield name


def _invalid(checkpoint: Checkpoint, message: str, hint: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path / FILE}: {message}", hint or "correct it, or remove the line")
