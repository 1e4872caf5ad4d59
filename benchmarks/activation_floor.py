#!/usr/bin/env python3
"""Measure the quantization loss of activations alone.

    python benchmarks/activation_floor.py model_zoo/llama/tales TEXT

transformers runs the checkpoint in fp32 with unquantized weights. Only the inputs of linear layers, except
lm_head, are fake-quantized. "k-bit significand" has no limit of range, so it approximates the least loss of
a float format with k bits (E4M3 has 4, bf16 8). The other rows have one choice of scales. Needs torch and
transformers (`llmc-aot[build]`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc.passes.quantize.fake_quantize import round_e2m1, round_e4m3

Rounding = Callable[[torch.Tensor, float], torch.Tensor]  # (input, its largest magnitude) -> rounded input
_CONTEXT, _BATCH = 512, 4  # tokens of a sequence, sequences of a batch


def significand(bits: int) -> Rounding:
    """Return the rounding to floats with `bits` significand bits and an unlimited exponent."""

    def rounded(x: torch.Tensor, amax: float) -> torch.Tensor:
        del amax
        fraction, exponent = torch.frexp(x)
        return torch.ldexp(torch.round(fraction * 2**bits) / 2**bits, exponent)

    return rounded


def int8(x: torch.Tensor, amax: float | torch.Tensor) -> torch.Tensor:
    """Fake-quantize `x` to int8 with the scale amax / 127."""
    scale = amax / 127
    return torch.clamp(torch.round(x / scale), -127, 127) * scale


ROUNDINGS: Mapping[str, Rounding] = {
    "E4M3, one scale": lambda x, amax: torch.from_numpy(round_e4m3(x.numpy(), amax / 448)),
    "NVFP4": lambda x, amax: torch.from_numpy(round_e2m1(x.numpy(), amax / 2688)),
    "int8, one scale": int8,
    "int8, a scale for each token": lambda x, _: int8(x, x.abs().amax(-1, keepdim=True)),
    **{f"{bits}-bit significand": significand(bits) for bits in (4, 5, 6, 7, 8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path, help="UTF-8, that the model was not trained on")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(options.checkpoint)(options.text.read_text("utf-8"))["input_ids"]
    sequences = torch.tensor(ids[: len(ids) // _CONTEXT * _CONTEXT]).view(-1, _CONTEXT)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }

    largest = dict.fromkeys(linears, 0.0)

    def note(name: str, x: torch.Tensor) -> torch.Tensor:
        largest[name] = max(largest[name], float(x.abs().max()))
        return x

    exact = log_probabilities(model, linears, sequences, note)
    print(f"{sequences.numel()} positions of {options.checkpoint.name}")
    print(f"{'activations':30} {'top-1':>8} {'mean KL':>10}")
    for title, rounding in ROUNDINGS.items():
        quantized = log_probabilities(
            model, linears, sequences, lambda name, x, to=rounding: to(x, largest[name])
        )
        agreement = (quantized.argmax(-1) == exact.argmax(-1)).double().mean()
        divergence = torch.nn.functional.kl_div(quantized, exact, reduction="batchmean", log_target=True)
        print(f"{title:30} {agreement:8.2%} {divergence:10.5f}")


@torch.no_grad()
def log_probabilities(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Module],
    sequences: torch.Tensor,
    on_input: Callable[[str, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return log-probabilities [positions, vocab], with the inputs of `linears` replaced by `on_input`."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: (on_input(name, inputs[0]),))
        for name, module in linears.items()
    ]
    try:
        parts = [model(part).logits.log_softmax(-1).flatten(0, 1) for part in sequences.split(_BATCH)]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts)


if __name__ == "__main__":
    main()
