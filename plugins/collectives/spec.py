"""The specification of the operators of one of several ranks: collectives, which combine the values of all
ranks of a tensor-parallel group, and the lookup in a part of a table.

    llmc.AllReduce   input   x  [N, W]          each rank's summand
                     output  y  [N, W]          the sum, added in the order of the ranks
    llmc.AllGather   input   x  [N, W]          each rank's columns
                     output  y  [N, ranks x W]  the columns of all ranks, in their order

    llmc.PartialEmbedding   inputs   ids    [N]     int32
                                     table  [R, W]  the rows begin .. begin + R - 1 of a table
                            output   y      [N, W]  the rows of the ids; 0 for ids that the part lacks

Attribute of PartialEmbedding: `begin`. Attributes of the collectives: `ranks`, the size of the group, and
`sequence`, the number of the collective in the graph. Every rank's graph has the same collectives in the same
order.
"""

from __future__ import annotations

DOMAIN = "llmc"
ALL_REDUCE = "AllReduce"
ALL_GATHER = "AllGather"
PARTIAL_EMBEDDING = "PartialEmbedding"
OF_RANKS = (ALL_REDUCE, ALL_GATHER, PARTIAL_EMBEDDING)
ABI_VERSION = 1
