"""The specification of `llmc.Experts`, the gated MLPs of a mixture of experts.

Each token has K experts among E, which the model's router chose, with a weight for each. Expert e of a token
x is down_e · (f(gate) * up), where [gate; up] = gate_up_e · x. The token's output is the weighted sum of its
experts. An expert may be chosen more than once, and then counts more than once. Routers choose with TopK: of
equal numbers, the one of the lowest expert comes first.

    inputs      x        [T, D]         model dtype
                ids      [T, K]         int64, 0 .. E - 1
                weights  [T, K]         model dtype
                gate_up  [E * 2*I, D]   model dtype: of each expert I rows of gates, then I rows of ups
                down     [E * D, I]     model dtype: of each expert D rows
    output      y        [T, D]         model dtype: the sum over k = 0 .. K - 1
    attributes  experts: E; activation: the place of f in ACTIVATIONS

The matrices are those of all experts in order, one below the other. So quantization, packing and parts of
rows treat them as those of any linear layer.
"""

from __future__ import annotations

DOMAIN = "llmc"
NAME = "Experts"
ABI_VERSION = 1
#: The places of the matrices among the inputs.
MATRICES = (3, 4)
#: Names of the native engine's functions. gelu is the one with erf.
ACTIVATIONS = ("silu", "gelu")
