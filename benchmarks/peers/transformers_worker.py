"""transformers: eager PyTorch in fp32, `generate` with its KV cache, requests in one left-padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from protocol import Generation, main
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Records the time of each token. `generate` calls it once per step; it never stops the generation."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        at = self.generation.now()
        for request, token in enumerate(input_ids[:, -1].tolist()):
            self.generation.emit(request, token, at)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    """A `protocol.Tool`."""

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self.model.generation_config.eos_token_id = None  # never stop early
        self.describe = {
            "dtype": str(self.model.dtype),
            "attention": self.model.config._attn_implementation,
            "threads": torch.get_num_threads(),
        }

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        generation = Generation(len(prompts))
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_Clock(generation)]),
        )
        return generation


def first(model: Path, threads: int, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tool = Transformers(model, threads)
    ids = tokenizer(text)["input_ids"]
    return str(tokenizer.decode(tool.generate([ids], 1).tokens[0]))


if __name__ == "__main__":
    main(Transformers, first, packages=("torch", "transformers"))
