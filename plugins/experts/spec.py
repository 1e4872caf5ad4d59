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
                gate_up_bias [E, 2*I], down_bias [E, D]   optional, both or none: model dtype
    output      y        [T, D]         model dtype: the sum over k = 0 .. K - 1
    attributes  experts: E; activation: the place of f in ACTIVATIONS; limit, alpha: of clamped_swiglu

With the activation clamped_swiglu (gpt-oss) the rows of gate_up alternate: a gate, its up, the next gate. An
expert is then down_e · ((clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)) with g = min(gate, limit).

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
ACTIVATIONS = ("silu", "gelu", "clamped_swiglu")
#: The number of inputs without biases.
REQUIRED = 5
