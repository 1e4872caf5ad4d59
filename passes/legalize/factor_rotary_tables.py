"""FactorRotaryTables: replace each rotary table with a row per position by two small tables.

The canonical graph gathers row p of cos and sin [positions, R], fp32. With p = 256*h + l, the angle of p is
the angle a of 256*h plus the angle b of l, and

    cos(a + b) = cos a cos b - sin a sin b        sin(a + b) = sin a cos b + cos a sin b

So rows 0 to 255 (`low`) and every 256th row (`high`) are enough: 0.2 MB for 40,960 positions and R = 64. The
whole tables take 21 MB. Everything is computed in fp32 and rounded where the replaced rows were rounded.

The difference between the products and the whole table has a bound. Let u = 2^-24, let s be the factor that
a model may scale its tables by, and let f be a frequency:

angles   A model rounds p*f to fp32, with an error of at most u*p*f. The errors of 256*h*f and l*f add up to
         at most as much. The two angles differ by at most 2*u*p*f.
values   cos and sin have an error of at most 2u (one unit in the last place), 3u after multiplication by s,
         and 4u after division by s. The four factors give sqrt(2)*(3 + 4)*u, the products and the sum round
         by 2u, and the whole table has an error of 3u: less than 16u together.

The bound is s*u*(2*p*f + 16), and `factor` checks it for every element. Both tables are equally
close to the exact angles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage

BLOCK = 256  # positions for which `low` has rows
UNIT = 2.0**-24  # the largest relative error of rounding to fp32


@dataclass(frozen=True)
class Factors:
    """The small tables, fp32."""

    #: [256, R], scaled by s.
    low_cos: np.ndarray
    #: [256, R], scaled by s.
    low_sin: np.ndarray
    #: [blocks, R], not scaled.
    high_cos: np.ndarray
    #: [blocks, R], not scaled.
    high_sin: np.ndarray

    def block(self, h: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin [256, R], fp32, for positions from 256*h on, as the engine computes them."""
        cos, sin = self.high_cos[h], self.high_sin[h]
        return cos * self.low_cos - sin * self.low_sin, sin * self.low_cos + cos * self.low_sin


def factor(cos: np.ndarray, sin: np.ndarray) -> Factors | None:
    """Return the factors of two tables [positions, R], fp32.

    Returns None if the tables are too short to gain from it, or if the products exceed the bound.
    """
    scale = cos[0, 0]
    if len(cos) <= 2 * BLOCK or not scale > 0:
        return None
    low, high = slice(BLOCK), slice(None, None, BLOCK)
    result = Factors(cos[low].copy(), sin[low].copy(), cos[high] / scale, sin[high] / scale)
    frequency = np.abs(np.arctan2(sin[1], cos[1], dtype=np.float64))
    for h, begin in enumerate(range(0, len(cos), BLOCK)):
        positions = np.arange(begin, min(begin + BLOCK, len(cos)))[:, None]
        bound = scale * UNIT * (2 * positions * frequency + 16)
        for table, products in zip((cos, sin), result.block(h), strict=True):
            whole = table[begin : begin + BLOCK].astype(np.float64)
            if not (np.abs(products[: len(whole)] - whole) <= bound).all():
                return None
    return result


class FactorRotaryTables:
    """Replace rows of large rotary tables by products of rows of small ones. Counts the pairs of tables.

    Tables that `factor` refuses stay unchanged. Nodes may be out of order afterwards.
    """

    name = "factor-rotary-tables"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches(_factor_tables(model.graph))
        edit.remove_unused(model)
        return matches


def _factor_tables(graph: ir.Graph) -> int:
    pairs: dict[ir.Node, ir.Node] = {}
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            cos, sin = _gather(edit.operand(node, 1)), _gather(edit.operand(node, 2))
            if cos is not None and sin is not None and edit.operand(cos, 1) is edit.operand(sin, 1):
                pairs[cos] = sin
    indices: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    count = 0
    for cos, sin in pairs.items():
        tables = [_table(node) for node in (cos, sin)]
        if tables[0] is None or tables[1] is None or tables[0].shape != tables[1].shape:
            continue
        if (factors := factor(tables[0], tables[1])) is not None:
            positions = edit.operand(cos, 1)
            if positions not in indices:
                indices[positions] = _split(cos, positions)
            _replace(cos, sin, factors, *indices[positions])
            count += 1
    return count


def _gather(angles: ir.Value) -> ir.Node | None:
    """Return the Gather that `angles` comes from, if only reshapes and casts lie between; else None."""
    node = angles.producer()
    while node is not None and node.op_type in ("Cast", "Reshape"):
        node = edit.operand(node, 0).producer()
    if node is None or node.op_type != "Gather":
        return None
    return node if "axis" not in node.attributes or edit.attribute(node, "axis") == 0 else None


def _table(gather: ir.Node) -> np.ndarray | None:
    """Return the table [positions, R] whose rows are gathered, if it is constant and fp32; else None."""
    table = edit.operand(gather, 0)
    if table.const_value is None or table.dtype != ir.DataType.FLOAT or len(edit.dims(table)) != 2:
        return None
    return table.const_value.numpy()


def _split(near: ir.Node, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Insert positions // 256 and positions % 256 before `near`, in the dtype of positions. Return both."""
    graph, shape = near.graph, edit.dims(positions)
    assert isinstance(graph, ir.Graph)
    assert positions.dtype is not None
    size = edit.constant(graph, np.array(BLOCK, positions.dtype.numpy()), "rotary_block")
    # Div truncates, and no position is negative. TensorRT's parser has neither BitShift nor BitwiseAnd.
    high = edit.insert(near, "Div", [positions, size], {}, "rotary_high", shape)
    begin = edit.insert(near, "Mul", [high, size], {}, "rotary_begin", shape)
    return high, edit.insert(near, "Sub", [positions, begin], {}, "rotary_low", shape)


def _replace(cos: ir.Node, sin: ir.Node, factors: Factors, high: ir.Value, low: ir.Value) -> None:
    """Replace the rows [T, R] that `cos` and `sin` gather by products of rows of the factors."""
    graph, shape = cos.graph, edit.dims(cos.outputs[0])
    assert isinstance(graph, ir.Graph)

    def rows(whole: ir.Node, part: str, table: np.ndarray, index: ir.Value) -> ir.Value:
        name = f"{edit.operand(whole, 0).name}.{part}"
        value = edit.constant(graph, table, name)
        return edit.insert(cos, "Gather", [value, index], {"axis": 0}, f"{name}.rows", shape)

    def combine(op: str, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        return edit.insert(cos, op, [a, b], {}, f"{cos.name}.{name}", shape)

    cos_a, sin_a = rows(cos, "high", factors.high_cos, high), rows(sin, "high", factors.high_sin, high)
    cos_b, sin_b = rows(cos, "low", factors.low_cos, low), rows(sin, "low", factors.low_sin, low)
    cos_cos, sin_sin = combine("Mul", cos_a, cos_b, "cos_cos"), combine("Mul", sin_a, sin_b, "sin_sin")
    sin_cos, cos_sin = combine("Mul", sin_a, cos_b, "sin_cos"), combine("Mul", cos_a, sin_b, "cos_sin")
    cos_sum = combine("Sub", cos_cos, sin_sin, "cos_sum")
    sin_sum = combine("Add", sin_cos, cos_sin, "sin_sum")
    edit.replace(cos, cos_sum)
    edit.replace(sin, sin_sum)
