"""The specification of `llmc.GroupedTopK`, the k largest numbers of a row in the best groups of its columns.

    inputs      x        [T, E]     model dtype: the numbers that are returned
                choice   [T, E]     model dtype: those that are compared, which may be x itself
    outputs     values   [T, k]     model dtype: columns of x
                ids      [T, k]     int64: these columns, in falling order of `choice`
    attributes  groups: the number of groups, of E / groups neighbouring columns
                scored: the score of a group is the sum of so many of its largest numbers of `choice`
                kept: so many groups, those with the largest scores, are chosen from; kept * E / groups >= k
                k

Of equal scores, that of the lowest group comes first; of equal numbers, that of the lowest column.
Routers of DeepSeek-V2 (arXiv:2405.04434, scored = 1) and V3 (arXiv:2412.19437, scored = 2) choose so.
"""

from __future__ import annotations

DOMAIN = "llmc"
NAME = "GroupedTopK"
ABI_VERSION = 1
