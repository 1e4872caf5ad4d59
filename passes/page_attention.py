"""PageAttention: attention of a sequence with itself becomes attention with a paged KV cache.

before  TracedAttention(q [1,Hq,T,D], k [1,Hkv,T,D], v [1,Hkv,T,Dv]) -> [1,T,Hq,Dv]
after   llmc.PagedAttention(q [T,Hq*D], k [T,Hkv*D], v [T,Hkv*Dv], key_cache.N, value_cache.N, step inputs)

Adds the graph inputs that describe a step, the cache of every layer, and the caches' new contents as
graph outputs (the same memory, written in place, wherever an engine can).
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.lower_rope import token_major
from llmc.passes.spec import Stage, module_of
from llmc.plugins.paged_attention import spec as operator


class PageAttention:
    """See the module's docstring. Counts one match per attention layer."""

    name = "page-attention"
    requires = Stage.TRACED
    ensures = Stage.PAGED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedAttention"]
        if nodes:
            step = _add_step_inputs(model.graph)
            for node in sorted(nodes, key=lambda n: edit.attribute(n, "layer")):
                _page(model.graph, node, step)
            model.opset_imports[operator.DOMAIN] = operator.ABI_VERSION
            edit.remove_unused(model)
        return Matches(len(nodes))


def _add_step_inputs(graph: ir.Graph) -> list[ir.Value]:
    values = []
    for name, length in operator.STEP_INPUTS.items():
        value = ir.Value(name=name, shape=ir.Shape([length]), type=ir.TensorType(ir.DataType.INT32))
        graph.inputs.append(value)
        values.append(value)
    return values


def _page(graph: ir.Graph, node: ir.Node, step: list[ir.Value]) -> None:
    layer = int(edit.attribute(node, "layer"))
    flat, dims = [], []
    for x, role in zip(node.inputs, ("query", "key", "value"), strict=True):
        assert x is not None and x.shape is not None
        heads, width = x.shape[1], x.shape[3]
        assert isinstance(heads, int) and isinstance(width, int)
        source = token_major(node, x)
        flat.append(edit.reshape(node, source, [-1, heads * width], f"{module_of(node)}.{role}"))
        dims.append((heads, width))
    (heads, _), (kv_heads, width), (_, value_width) = dims
    dtype = flat[0].dtype
    assert dtype is not None
    caches = []
    for role, size in (("key", width), ("value", value_width)):
        cache = ir.Value(
            name=f"{role}_cache.{layer}",
            shape=ir.Shape(["blocks", kv_heads, operator.BLOCK_SIZE, size]),
            type=ir.TensorType(dtype),
        )
        graph.inputs.append(cache)
        caches.append(cache)
    outputs = [
        ir.Value(name=f"{module_of(node)}.attention", shape=ir.Shape([edit.TOKENS, heads * value_width])),
        ir.Value(name=f"key_cache_out.{layer}", shape=caches[0].shape),
        ir.Value(name=f"value_cache_out.{layer}", shape=caches[1].shape),
    ]
    for output in outputs:
        output.type = ir.TensorType(dtype)
    paged = ir.node(
        operator.NAME,
        [*flat, *caches, *step],
        {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "scale": float(edit.attribute(node, "scale")),
            "window": int(edit.attribute(node, "window")),
            "softcap": float(edit.attribute(node, "softcap")),
        },
        domain=operator.DOMAIN,
        outputs=outputs,
        name=f"{module_of(node)}.paged_attention",
    )
    paged.metadata_props.update(node.metadata_props)
    graph.insert_before(node, paged)
    graph.outputs.extend(outputs[1:])
    back = edit.reshape(node, outputs[0], [1, -1, heads, value_width], f"{module_of(node)}.attention.heads")
    edit.replace(node, back)
