"""Map the names of a checkpoint's tensors to the names in the model, as transformers does when it loads them.

The rules are taken from transformers: the conversion mapping of the model type, the prefix of the base model,
the buffers that belong to the state dict, and the weights that are tied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_wrapper
from llmc.compiler.checkpoint.names import Shaped, collapse, compare_names
from llmc.compiler.checkpoint.prequantized.module import (
    KV_NAMES,
    ROLES,
    is_auxiliary,
    stack_role,
)
from llmc.compiler.checkpoint.prequantized.recognize import is_quantized
from llmc.compiler.checkpoint.safetensors import CHUNK_BYTES, StackedTensor, TensorRef
from llmc.runtime.dtypes import FLOATS
from llmc.runtime.errors import CheckpointError, UnsupportedError

# Scales of activations. Beside an unquantized weight they are not used.
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "output_scale")
# Buffers in old checkpoints that models compute now. transformers ignores the same names.
_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class ModelKeys:
    """The names and shapes in a model's state dict, and the mapping from names in checkpoints."""

    #: Parameter -> shape, without parameters that are tied to another one.
    parameters: Mapping[str, tuple[int, ...]]
    #: Persistent buffer -> shape. A checkpoint may lack buffers that the graph does not use.
    buffers: Mapping[str, tuple[int, ...]]
    #: Tied parameter -> the parameter whose data it shares.
    tied: Mapping[str, str]
    #: The model whose state dict the files hold: the language model, or the multimodal model around it.
    _loaded: PreTrainedModel
    #: Name of a module in `_loaded` -> its name in the language model.
    _modules: Mapping[str, str]

    @classmethod
    def of(cls, config: PreTrainedConfig, wrapper: PreTrainedModel | None = None) -> ModelKeys:
        """Return the keys of the causal language model of `config`, without allocating its weights.

        wrapper: the multimodal model that contains it, if any

        Raises UnsupportedError if transformers cannot make the model, or if `wrapper` contains another one.
        """
        model = make_model(AutoModelForCausalLM, config)
        tied = {alias: name for alias, name in model.all_tied_weights_keys.items() if alias != name}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            {name: tuple(value.shape) for name, value in parameters.items() if name not in tied},
            {
                name: tuple(value.shape)
                for name, value in model.state_dict().items()
                if name not in parameters
            },
            tied,
            model if wrapper is None else wrapper,
            {"": ""} if wrapper is None else _shared_modules(wrapper, model),
        )

    def loaded_name(self, name: str) -> str:
        """Return a module's or parameter's name in the loaded model, given its name in the language model."""
        for outer, inner in self._modules.items():
            if not inner or name == inner or name.startswith(f"{inner}."):
                return outer + name[len(inner) :]
        return name

    def _inner_name(self, name: str) -> str | None:
        """Return the name in the language model for one in the loaded model; None if it is another part."""
        for outer, inner in self._modules.items():
            if not outer or name.startswith(f"{outer}."):
                return inner + name[len(outer) :]
        return None

    def rename(self, checkpoint: Checkpoint) -> RenamedCheckpoint:
        """Return the checkpoint with the model's names.

        Raises CheckpointError if two tensors have the same name in the model.
        """
        names, unused, sources = self._names(checkpoint.tensors)
        converted = {name: each.first for name, each in sources.items() if not each.stacked}
        tensors: dict[str, TensorRef] = {
            name: each.stack(name, checkpoint) for name, each in sources.items() if each.stacked
        }
        for stored, name in names.items():
            if name in tensors:
                raise CheckpointError(
                    f"{checkpoint.path} holds {name} twice, the second time as {stored}",
                    hint="remove one of them",
                )
            tensors[name] = replace(checkpoint.tensors[stored], name=name)
        for alias, name in self.tied.items():
            if alias in tensors and not _is_stored(name, tensors):
                tensors[name] = replace(tensors.pop(alias), name=name)
        patterns = (*_COMPUTED, *(self._loaded._keys_to_ignore_on_load_unexpected or ()))
        ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
        unknown = tuple(name for name in unused if not ignored.search(name))
        return RenamedCheckpoint(replace(checkpoint, tensors=tensors), unknown, converted)

    def untied(self, tensors: Mapping[str, TensorRef]) -> list[str]:
        """Return the tied parameters that are stored with different values. transformers unties them.

        tensors: the tensors of a renamed checkpoint, by name. Those of tied parameters are read.
        """
        return [
            alias
            for alias, name in self.tied.items()
            if _is_stored(alias, tensors) and not _equal(alias, name, tensors)
        ]

    def _names(
        self, stored: Mapping[str, TensorRef]
    ) -> tuple[dict[str, str], list[str], dict[str, _Conversion]]:
        """Return stored name -> name in the model, stored names that the model lacks, and the conversions.

        stored: the checkpoint's tensors, by name

        A conversion belongs to a parameter, by its name in the model.
        """
        mapping = get_model_conversion_mapping(self._loaded)
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        state, prefix = self._loaded.state_dict(), self._loaded.base_model_prefix
        names: dict[str, str] = {}
        modules: dict[str, str] = {}
        others: list[str] = []
        converted: dict[str, _Conversion] = {}
        sources: set[str] = set()

        def loaded_name(key: str) -> str | None:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name in state and pattern is not None:
                rule = next(rule for rule in converters if pattern in rule.source_patterns)
                conversion = converted.setdefault(self._inner_name(name) or name, _Conversion(rule, key))
                conversion.stored.setdefault(pattern, []).append(key)
                sources.add(key)
                return None
            if name not in state:
                name, _ = rename_source_key(key, [], [], prefix, state)
            return name if name in state else None

        for key in sorted(stored, key=dot_natural_key):
            module, _, last = key.rpartition(".")
            if (loaded := loaded_name(key)) is not None:
                if (name := self._inner_name(loaded)) is not None:
                    names[key] = name
                    _add_modules(modules, key, name)
            elif (stack := stack_role(stored[key])) and (loaded := loaded_name(stack[0])) is not None:
                if (name := self._inner_name(loaded)) is not None:
                    names[key] = name + key.removeprefix(stack[0])
            elif key not in sources:
                others.append(key)
                weight = loaded_name(f"{module}.weight") if last in ROLES else None
                if weight is not None and (name := self._inner_name(weight)) is not None:
                    _add_modules(modules, f"{module}.weight", name)
        unused = []
        for key in others:
            module, _, last = key.rpartition(".")
            idle = (
                last in _OF_ACTIVATIONS
                and f"{module}.weight" in names
                and not _has_quantized_weight(module, stored)
            )
            if module in modules and not idle and (last in KV_NAMES or is_auxiliary(key)):
                names[key] = f"{modules[module]}.{last}"
            else:
                unused.append(key)
        return names, unused, converted


@dataclass(frozen=True)
class _Conversion:
    """A parameter that transformers computes from stored tensors."""

    rule: WeightConverter
    #: The stored name of the first tensor.
    first: str
    #: Pattern of the rule -> stored names, in the order of the numbers in them.
    stored: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        """Whether the parameter is a stack of the tensors, as of experts that are stored one by one."""
        operations = [(type(each), each.dim) for each in self.rule.operations if hasattr(each, "dim")]
        one = [(MergeModulelist, 0)]
        several = [*one, (Concatenate, 1)]
        is_stack = operations == (several if len(self.rule.source_patterns) > 1 else one)
        return is_stack and len(operations) == len(self.rule.operations)

    def stack(self, name: str, checkpoint: Checkpoint) -> StackedTensor:
        """Return the parameter. Raises CheckpointError if some of its tensors are missing or do not fit."""
        columns = [self.stored.get(pattern, []) for pattern in self.rule.source_patterns]
        if len({len(column) for column in columns}) > 1:
            counts = " and ".join(
                f"{len(column)} {pattern}"
                for column, pattern in zip(columns, self.rule.source_patterns, strict=True)
            )
            raise CheckpointError(
                f"{checkpoint.path} is incomplete: {name} is made of {counts}", hint="download it again"
            )
        refs = [[checkpoint.tensors[key] for key in row] for row in zip(*columns, strict=True)]
        if other := next((ref for row in refs for ref in row if ref.dtype not in FLOATS), None):
            raise UnsupportedError(
                f"{other.name} is {other.dtype}: the experts of this checkpoint are quantized already",
                "llmc quantizes the experts of an unquantized checkpoint: --quant int8 or --quant int4",
            )
        return StackedTensor.of(name, refs)


@dataclass(frozen=True)
class RenamedCheckpoint:
    """A checkpoint whose tensors have the model's names."""

    #: The checkpoint without tensors that the model lacks. Tied parameters that are stored twice are kept.
    checkpoint: Checkpoint
    #: Stored names of tensors that the model lacks and that transformers reports as unexpected.
    unused: tuple[str, ...]
    #: Parameter that transformers computes from stored tensors -> the name of the first of them.
    converted: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about tensors that are not used."""
        shown = collapse(self.unused)
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        unused = f"the model does not use {', '.join(shown[:3])}{more}; transformers ignores them too"
        return (*self.checkpoint.notes, unused) if self.unused else self.checkpoint.notes

    def compare(self, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Shaped]) -> None:
        """Check that `tensors` has what the model expects.

        expected: name -> shape
        tensors: the tensors of `checkpoint` by name; a quantized weight may be represented by its module

        Raises CheckpointError for missing tensors and other shapes, UnsupportedError for parameters that
        transformers computes from other tensors.
        """
        for name, stored in self.converted.items():
            if name in expected and name not in tensors:
                raise UnsupportedError(
                    f"transformers computes {name} from {stored} when it loads the checkpoint",
                    "save it in the model's own form with transformers: "
                    "`model.save_pretrained(directory, save_original_format=False)`",
                )
        compare_names(expected, tensors, self.unused)


def read_model(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[ModelKeys, RenamedCheckpoint]:
    """Return the keys of the model of `config`, and the checkpoint with the model's names.

    Changes `config.tie_word_embeddings` to what transformers does with this checkpoint.
    Raises CheckpointError and UnsupportedError as `ModelKeys.of` and `ModelKeys.rename` do.
    """
    whole = load_wrapper(checkpoint)
    wrapper = None if whole is None else make_model(AutoModelForMultimodalLM, whole)
    notes = []
    if wrapper is not None:
        config.tie_word_embeddings = bool(wrapper.all_tied_weights_keys)
        notes.append(
            f"only the language model ({config.model_type}) of {wrapper.config.model_type} is built, for text"
        )
    keys = ModelKeys.of(config, wrapper)
    renamed = keys.rename(checkpoint)
    if untied := keys.untied(renamed.checkpoint.tensors):
        notes.append(f"config.json ties {untied[0]}, but the checkpoint has its own values, which are used")
        config.tie_word_embeddings = False
        keys = ModelKeys.of(config, wrapper)
        if still_tied := sorted(keys.tied.keys() & set(untied)):
            raise UnsupportedError(
                f"{config.model_type} shares {still_tied[0]} with {keys.tied[still_tied[0]]}, "
                "but the checkpoint has both, with different values",
                "remove one of them from the checkpoint",
            )
        renamed = keys.rename(checkpoint)
    named = renamed.checkpoint
    tensors = {name: ref for name, ref in named.tensors.items() if name not in keys.tied}
    named = replace(named, tensors=tensors, notes=(*named.notes, *notes))
    return keys, replace(renamed, checkpoint=named)


def make_model(auto: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of `config` on the device "meta".

    auto: one of transformers' AutoModel classes

    Raises UnsupportedError if transformers cannot make it.
    """
    try:
        with torch.device("meta"), no_init_weights():
            return auto.from_config(config, trust_remote_code=False)
    except Exception as error:  # model code raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(
            f"transformers cannot make a {config.model_type} model from config.json: {reason[:200]}",
            "compare it with the config.json of the original model",
        ) from error


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the module with the layers of a language model, or of a multimodal model around one.

    transformers' `get_decoder` returns all of Llama4ForCausalLM.
    """
    decoder: Any = model.get_decoder()
    return decoder.model if decoder.get_output_embeddings() is not None else decoder


def _shared_modules(wrapper: PreTrainedModel, model: PreTrainedModel) -> dict[str, str]:
    """Map the names of the decoder and lm_head in `wrapper` to their names in the language model."""
    pairs = (
        (decoder_of(wrapper), decoder_of(model)),
        (wrapper.get_output_embeddings(), model.get_output_embeddings()),
    )
    shared = {}
    for outer, inner in pairs:
        outer_name, inner_name = _name_of(outer, wrapper), _name_of(inner, model)
        if not outer_name or not inner_name or type(outer) is not type(inner):
            raise UnsupportedError(
                f"the language model of {type(wrapper).__name__} is not a {type(model).__name__}",
                "llmc compiles text-only causal language models",
            )
        shared[outer_name] = inner_name
    return shared


def _name_of(module: object, model: PreTrainedModel) -> str:
    return next((name for name, candidate in model.named_modules() if candidate is module), "")


def _add_modules(modules: dict[str, str], stored: str, name: str) -> None:
    """Record stored name -> model's name for the modules above a tensor, while both names end alike."""
    while stored.rpartition(".")[2] == name.rpartition(".")[2]:
        stored, name = stored.rpartition(".")[0], name.rpartition(".")[0]
        if not stored or not name or stored in modules:
            return
        modules[stored] = name


def _is_stored(name: str, tensors: Mapping[str, TensorRef]) -> bool:
    return name in tensors or _has_quantized_weight(name.rpartition(".")[0], tensors)


def _has_quantized_weight(module: str, tensors: Mapping[str, TensorRef]) -> bool:
    """Return whether the tensors of a module are those of a quantized weight."""
    parts = {
        role: ref for last, role in ROLES.items() if (ref := tensors.get(f"{module}.{last}")) is not None
    }
    return is_quantized(parts)


def _equal(alias: str, name: str, tensors: Mapping[str, TensorRef]) -> bool:
    """Return whether both tensors are stored unquantized, with the same values."""
    tied, other = tensors.get(alias), tensors.get(name)
    if (
        tied is None
        or other is None
        or any(_has_quantized_weight(stored.rpartition(".")[0], tensors) for stored in (alias, name))
    ):
        return False
    if tied.shape != other.shape or not {tied.dtype, other.dtype} <= set(FLOATS):
        return False
    step = max(1, CHUNK_BYTES * tied.shape[0] // max(1, tied.nbytes))
    blocks = (slice(first, first + step) for first in range(0, tied.shape[0], step))
    return all(
        np.array_equal(tied.read(rows).astype(np.float32), other.read(rows).astype(np.float32))
        for rows in blocks
    )
