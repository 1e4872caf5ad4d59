"""The specification of `llmc.HeadLinear`, which multiplies each head by a matrix of its own.

    inputs      x   [T, H*K]              model dtype
                w   [H*each, columns]     model dtype: of each head a matrix [each, columns]
    output      y   [T, H*N]              model dtype
    attributes  heads: H; begin, rows: W_h is the rows begin .. begin + rows - 1 of the matrix of head h;
                transposed: 0: y_h = W_h · x_h, with K = columns and N = rows
                            1: y_h = W_h^T · x_h, with K = rows and N = columns

The absorbed form of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) has two for each layer. Both
read `kv_b_proj.weight`, in which the rows of a head are those of its keys, then those of its values.
"""

from __future__ import annotations

DOMAIN = "llmc"
NAME = "HeadLinear"
ABI_VERSION = 1
#: The place of the matrices among the inputs.
MATRICES = 1
