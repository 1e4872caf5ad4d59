"""The specification of the operators of one of several ranks: collectives, which combine the values of all
ranks of a tensor-parallel group, transfers between pipeline stages, and the lookup in a part of a table.

    llmc.AllReduce   input   x  [N, W]          each rank's summand
                     output  y  [N, W]          the sum, added in the order of the ranks
    llmc.AllGather   input   x  [N, W]          each rank's columns
                     output  y  [N, ranks x W]  the columns of all ranks, in their order

    llmc.PartialEmbedding   inputs   ids    [N]     int32
                                     table  [R, W]  the rows begin .. begin + R - 1 of a table
                            output   y      [N, W]  the rows of the ids; 0 for ids that the part lacks

    llmc.Send   input   x  [N, ...]   goes to the rank `peer`
                output  y  [N, ...]   x, so that the node has a reader
    llmc.Recv   output  y  [N, ...]   what the rank `peer` sends

Attribute of PartialEmbedding: `begin`. Attributes of the collectives: `ranks`, the size of the group, and
`sequence`, the number of the collective in the graph. Every rank of a group has the same collectives in the
same order. Attributes of transfers: `peer`, a number among the ranks of all groups, and `sequence`, which a
Send has in common with its Recv.
"""

from __future__ import annotations

DOMAIN = "llmc"
ALL_REDUCE = "AllReduce"
ALL_GATHER = "AllGather"
PARTIAL_EMBEDDING = "PartialEmbedding"
SEND, RECV = "Send", "Recv"
#: With a sequence number: the output of a Send in TensorRT's engine, one number that means nothing.
SENT = "sent."
OF_RANKS = (ALL_REDUCE, ALL_GATHER, PARTIAL_EMBEDDING, SEND, RECV)
ABI_VERSION = 1
