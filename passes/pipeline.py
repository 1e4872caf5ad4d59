"""THE pipeline: every graph pass of a build, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmc.passes.canonicalize.fold_reshapes import FoldReshapes
from llmc.passes.canonicalize.fuse_linears import FuseLinears
from llmc.passes.canonicalize.gather_logits import GatherLogits
from llmc.passes.canonicalize.lower_layers import LowerLinear, LowerRMSNorm
from llmc.passes.canonicalize.lower_rope import LowerRope
from llmc.passes.canonicalize.pack_tokens import PackTokens
from llmc.passes.canonicalize.page_attention import PageAttention
from llmc.passes.canonicalize.sink_transposes import SinkTransposes
from llmc.passes.contract import Pass


def pipeline(why_apart: Callable[[Sequence[str]], str] = lambda weights: "") -> list[Pass]:
    """The passes from a traced graph to the canonical one. `why_apart`: see FuseLinears."""
    return [
        # 1. Attention: from one sequence without a cache to packed sequences with a paged one.
        SinkTransposes(),  # first: leaves one order of norm and transpose to recognize
        LowerRope(),  # before paging: it moves the rotation in front of the transposes that paging consumes
        PageAttention(),
        # 2. Tokens: only attention mixes them, so the batch axis can go once attention is paged.
        PackTokens(),
        FoldReshapes(),  # the rewrites above leave pairs of reshapes around attention
        # 3. Layers: standard operators, now that activations are [T, features].
        LowerLinear(),
        LowerRMSNorm(),
        FuseLinears(why_apart),  # after LowerLinear: it joins Gemms
        # 4. Output: needs the lm_head as a Gemm.
        GatherLogits(),
    ]
