"""The recipe of a model family: `model_zoo/<model_type>/recipe.toml`.

    architecture = "LlamaForCausalLM"
    [matches]                            # pass -> number of places that it must rewrite
    lower-rope = { per_layer = 2 }
    lower-linear = { per_layer = 7, model = 1 }
    [verify]
    logit_tolerance = 1e-4               # fp32; absolute, for logits of order 10
    [quantize]                           # optional
    exclude = ["*.router"]               # modules that are not quantized; shell patterns

A family without a recipe is compiled too. Only the verification decides then whether the build succeeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """The recipe of a model family."""

    model_type: str
    #: Whether the family has a recipe.
    known: bool = False
    #: Pass name -> (places per layer, places per model).
    matches: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: The largest absolute difference of fp32 logits that verification accepts.
    logit_tolerance: float = DEFAULT_TOLERANCE
    #: Modules that are not quantized, as shell patterns.
    quantize_exclude: tuple[str, ...] = ()

    def expected(self, num_layers: int) -> dict[str, int]:
        """Return pass name -> the number of places it must rewrite in a model of `num_layers` layers."""
        return {name: layer * num_layers + model for name, (layer, model) in self.matches.items()}


def load(model_type: str) -> Recipe:
    """Return the recipe of a family; without a recipe.toml an empty one with `known` False."""
    file = resources.files("llmc.model_zoo") / model_type / "recipe.toml"
    if not model_type.isidentifier() or not file.is_file():
        return Recipe(model_type)
    data: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    matches = {name: (row.get("per_layer", 0), row.get("model", 0)) for name, row in data["matches"].items()}
    tolerance = data.get("verify", {}).get("logit_tolerance", DEFAULT_TOLERANCE)
    exclude = tuple(data.get("quantize", {}).get("exclude", ()))
    return Recipe(model_type, True, matches, tolerance, exclude)


def known_families() -> list[str]:
    """Return the families with a recipe, sorted."""
    root = resources.files("llmc.model_zoo")
    return sorted(entry.name for entry in root.iterdir() if (entry / "recipe.toml").is_file())
