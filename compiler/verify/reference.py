"""The reference: transformers with eager attention, on the checkpoint's weights or the engine's."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config, load_wrapper
from llmc.compiler.checkpoint.context import choose_context
from llmc.compiler.checkpoint.model_keys import decoder_of, read_model
from llmc.compiler.checkpoint.prequantized.dequantize import dequantize, iter_rows
from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint, read_quantized
from llmc.compiler.checkpoint.prequantized.module import QuantizedModule
from llmc.compiler.checkpoint.safetensors import CHUNK_BYTES, TensorRef, read_header
from llmc.compiler.verify.engine_weights import ActivationQuantization, EngineWeight
from llmc.compiler.verify.job import ReferenceWeights
from llmc.runtime.cpus import available_cpus
from llmc.runtime.dtypes import BY_NAME
from llmc.runtime.errors import BuildError, CheckpointError

# Tolerance, relative to the largest logit, between lm_head applied to one row and to many.
_HEAD_TOLERANCE = 1e-4
_DISTURBANCE = 2.0**-16  # relative: the error that logits of fp32 engines may have (1e-4 of 10)
# Largest relative error of a quantized weight (Frobenius norm). It is 1 if everything is rounded to zero, and
# 1.4 for another weight of the same size.
_UNRELATED = 1.2


class Reference:
    """A causal language model in transformers, with eager attention.

    checkpoint: the checkpoint's directory
    dtype: the compute dtype, "fp32", "fp16" or "bf16"
    weights: "dequantized" for a pre-quantized checkpoint
    max_seq_len: the context length of the bundle; None for the model's
    """

    def __init__(
        self,
        checkpoint: str,
        dtype: str,
        weights: ReferenceWeights = "checkpoint",
        max_seq_len: int | None = None,
    ) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model, self._name = _load(
                checkpoint, getattr(torch, BY_NAME[dtype].numpy), weights, max_seq_len
            )
        self.model.eval()
        decoder = decoder_of(self.model)
        self._decoder = next(name for name, module in self.model.named_modules() if module is decoder)

    @torch.no_grad()
    def use_weights(self, weights: Mapping[str, EngineWeight]) -> None:
        """Replace weights by the engine's quantized ones.

        weights: name in the checkpoint -> the engine's weight

        If two modules share a weight (a tied lm_head), only the named module's weight changes.
        Raises BuildError for a name or a shape that the model does not have, and for a weight that is not the
        checkpoint's: rounding loses less than all of it.
        """
        headers = {weight.file: read_header(weight.file) for weight in weights.values() if weight.arrays}

        def replace(name: str) -> None:
            weight = weights[name]
            module, attribute = self._parameter_of(name)
            parameter = getattr(module, attribute)
            values = torch.from_numpy(weight.read(headers[weight.file]))
            if parameter.dim() == 3:  # experts, whose matrices are one in the engine
                values = values.view(len(parameter), -1, values.shape[-1])
                if _is_transposed(module):
                    values = values.transpose(1, 2).contiguous()
            if values.shape != parameter.shape:
                got, wanted = list(values.shape), list(parameter.shape)
                raise BuildError(
                    f"the engine has {name} as {got}, transformers as {wanted}", "please report this"
                )
            before = parameter.float()
            if (values - before).norm() > _UNRELATED * before.norm():
                raise BuildError(f"the engine's {name} is not the checkpoint's", "please report this")
            setattr(module, attribute, nn.Parameter(values.to(parameter.dtype), requires_grad=False))

        with ThreadPoolExecutor(available_cpus()) as pool:
            for _ in pool.map(replace, [name for name, weight in weights.items() if weight.arrays]):
                pass

    def quantize_activations(self, weights: Mapping[str, EngineWeight]) -> None:
        """Quantize the inputs of linear layers as the engine does. weights: as in `use_weights`."""
        for name, weight in weights.items():
            if weight.input is not None:
                module, _ = self._parameter_of(name)
                module.register_forward_pre_hook(_quantizer(weight.input))

    def _parameter_of(self, name: str) -> tuple[Any, str]:
        """Return the module of a quantized weight, and the name of its parameter there.

        That of experts has the name of the engine's module.
        """
        whole = self._name(name.removesuffix(".weight"))
        outer, _, last = whole.rpartition(".")
        for module_name, attribute in ((whole, "weight"), (outer, last)):
            try:
                module = self.model.get_submodule(module_name)
            except AttributeError:
                continue
            if name.endswith(".weight") and isinstance(getattr(module, attribute, None), nn.Parameter):
                return module, attribute
        raise BuildError(
            f"transformers' model has no {name}, which the engine quantizes", "please report this"
        )

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits of every position, float32 [len, vocabulary]."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    @torch.no_grad()
    def disturbed_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [len, vocabulary] after a small disturbance of the embeddings.

        They are multiplied by 1 + 2^-16 x a normal distribution, the same one in every call.
        """
        generator = torch.Generator().manual_seed(0)

        def disturb(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * (1 + _DISTURBANCE * torch.randn(output.shape, generator=generator))

        hook = self.model.get_input_embeddings().register_forward_hook(disturb)
        try:
            return self.logits(ids)
        finally:
            hook.remove()

    def continues_with(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Return whether `tokens` are the greedy continuation of `prompt`.

        They are, if each of them is the best one after `prompt` and those before it.
        """
        best = self.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :].argmax(-1)
        return best.tolist() == list(tokens)

    @torch.no_grad()
    def states(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the last hidden states [len, hidden], which are much smaller than the logits.

        Raises BuildError if `head` does not turn them into the model's logits.
        """
        captured: list[torch.Tensor] = []
        decoder = self.model.get_submodule(self._decoder)
        hook = decoder.register_forward_hook(lambda module, args, output: captured.append(output[0]))
        parameters = inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        try:
            last = self.model(input_ids=torch.tensor([ids]), use_cache=False, **options).logits[0, -1]
        finally:
            hook.remove()
        if self._decoder and captured:
            recomputed = self.head().logits(captured[0][0, -1:])[0]
            bound = _HEAD_TOLERANCE * max(1.0, float(last.abs().max()))
            if np.abs(recomputed - last.float().numpy()).max() <= bound or not last.isfinite().all():
                return captured[0][0]
        raise BuildError(
            f"the logits of {type(self.model).__name__} are not those of its decoder's last hidden states",
            "please report this with the model's config.json",
        )

    def head(self) -> Head:
        """Return a snapshot of the end of the model, which turns hidden states into logits."""
        return Head(self.model, self._decoder)

    def drop_layers(self) -> None:
        """Free the decoder's layers. A `head` that was returned before still works."""
        decoder = self.model.get_submodule(self._decoder)
        for name, module in list(decoder.named_children()):
            if isinstance(module, nn.ModuleList):
                setattr(decoder, name, nn.ModuleList())


def _is_transposed(module: Any) -> bool:
    """Return whether experts have their matrices as [experts, in, out]."""
    # As many numbers go into the first matrix as come out of the second.
    return bool(module.gate_up_proj.shape[1] == module.down_proj.shape[2])


class Head:
    """The end of a model: lm_head, with the weight that it has now, and what the model does to logits."""

    def __init__(self, model: Any, decoder: str) -> None:
        self._model, self._decoder = model, decoder
        self._last = model.get_output_embeddings()
        self._weight, self._hooks = self._last.weight, dict(self._last._forward_pre_hooks)

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> np.ndarray:
        """Turn hidden states [n, hidden] into logits, float32 [n, vocabulary]."""
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[None])
        output.router_logits = None  # mixtures of experts return them
        with (
            self._original_lm_head(),
            _forward(self._model.get_submodule(self._decoder), lambda *args, **options: output),
        ):
            ids = torch.zeros((1, len(states)), dtype=torch.int64)
            return self._model(input_ids=ids, use_cache=False).logits[0].float().numpy()

    @contextlib.contextmanager
    def _original_lm_head(self) -> Iterator[None]:
        """Use the weight and hooks that lm_head had when this Head was made."""
        weight, hooks = self._last.weight, dict(self._last._forward_pre_hooks)
        self._set(self._weight, self._hooks)
        try:
            yield
        finally:
            self._set(weight, hooks)

    def _set(self, weight: nn.Parameter, hooks: Mapping[int, Any]) -> None:
        self._last.weight = weight
        self._last._forward_pre_hooks.clear()
        self._last._forward_pre_hooks.update(hooks)


@contextlib.contextmanager
def _forward(module: Any, forward: Any) -> Iterator[None]:
    """Replace `module.forward` by `forward` inside the context."""
    module.forward = forward  # an attribute of the instance hides the method of the class
    try:
        yield
    finally:
        del module.forward


def _quantizer(quantization: ActivationQuantization) -> Any:
    """Return a forward pre-hook that quantizes a module's input."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        return (torch.from_numpy(quantization.apply(x.float().numpy())).to(x.dtype), *args[1:])

    return hook


def _load(
    checkpoint: str, dtype: torch.dtype, weights: ReferenceWeights, max_seq_len: int | None
) -> tuple[Any, Callable[[str], str]]:
    """Return the model, and a function from names in the language model to names in that model.

    A multimodal model is loaded as a whole, except with dequantized weights.
    """
    opened = Checkpoint.open(checkpoint)
    config = choose_context(load_config(opened), max_seq_len).config
    changed_config = copy.deepcopy(config)  # read_model changes it; from_pretrained ties weights by itself
    keys, renamed = read_model(opened, changed_config)
    options = {"dtype": dtype, "attn_implementation": "eager", "trust_remote_code": False}
    if weights == "checkpoint":
        full_config = load_wrapper(opened)
        if full_config is None:
            auto, full_config = transformers.AutoModelForCausalLM, config
        else:
            auto = transformers.AutoModelForMultimodalLM
            full_config.get_text_config().rope_parameters = config.rope_parameters
        model = auto.from_pretrained(checkpoint, config=full_config, local_files_only=True, **options)
        return model, keys.loaded_name
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(changed_config, **options)
    model.tie_weights()  # which the initialization would have done
    _fill(model, read_quantized(renamed.checkpoint))
    return model, lambda name: name


@torch.no_grad()
def _fill(model: Any, quantized: QuantizedCheckpoint) -> None:
    """Fill every parameter from the checkpoint, dequantized, a block of rows at a time."""
    tied = {alias for alias, name in model.all_tied_weights_keys.items() if alias != name}
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        done = 0
        for rows in _values(name, quantized):
            part = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
            if part.shape[1:] != parameter.shape[1:] or done + len(part) > len(parameter):
                break
            parameter[done : done + len(part)] = part.to(parameter.dtype)
            done += len(part)
        if done != len(parameter):
            raise CheckpointError(
                f"the checkpoint has no {name} of shape {list(parameter.shape)}",
                "`llmc check` compares its tensors with its configuration",
            )


def _values(name: str, quantized: QuantizedCheckpoint) -> Iterator[np.ndarray]:
    """Yield blocks of rows of a parameter; nothing if the checkpoint lacks it."""
    if (stack := quantized.modules.get(name)) is not None and stack.experts:
        rows = stack.shape[0] // stack.experts
        for first in range(0, stack.shape[0], rows):
            yield dequantize(stack, slice(first, first + rows)).T[None]
        return
    module_name, _, last = name.rpartition(".")
    module = quantized.modules.get(module_name)
    if module is None or last not in ("weight", "bias"):
        ref = quantized.plain.get(name)
        yield from () if ref is None else ref.iter_chunks()
    elif last == "weight":
        yield from _weight(module)
    elif (bias := module.tensors.get("bias")) is not None:
        yield bias.read()


def _weight(module: QuantizedModule) -> Iterator[np.ndarray]:
    """Yield blocks of rows of a dequantized weight, float32 [n, in], with AWQ's input factor applied."""
    scale: TensorRef | None = module.tensors.get("pre_quant_scale")
    columns = np.float32(1) if scale is None else scale.read().astype(np.float32)
    for rows in iter_rows(module, CHUNK_BYTES):
        yield rows * columns
