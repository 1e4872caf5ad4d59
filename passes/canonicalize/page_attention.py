"""PageAttention: replace attention of a sequence with itself by attention over a paged KV cache.

before  TracedAttention(q [1,Hq,T,D], k [1,Hkv,T,D], v [1,Hkv,T,Dv], sinks) -> [1,T,Hq,Dv]
after   llmc.PagedAttention(q [T,Hq*D], k [T,Hkv*D], v [T,Hkv*Dv], key_cache.N, value_cache.N, step inputs,
                            sinks)

Latent attention has no values: the cache of a layer is that of its keys alone.

The pass adds graph inputs for the batch of a step and for each layer's caches. The updated caches are graph
outputs. Engines that can write in place give both the same memory.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.canonicalize.lower_rope import token_major
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of
from llmc.plugins.paged_attention import spec as operator


class PageAttention:
    """Replace TracedAttention by PagedAttention. Counts one match per attention layer."""

    name = "page-attention"
    requires = Stage.TRACED
    ensures = Stage.PAGED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedAttention"]
        if nodes:
            step = [_input(model.graph, name, [size]) for name, size in operator.STEP_INPUTS.items()]
            for node in sorted(nodes, key=lambda n: edit.attribute(n, "layer")):
                _page(model.graph, node, step)
            model.opset_imports[operator.DOMAIN] = operator.ABI_VERSION
            edit.remove_unused(model)
        return Matches(len(nodes))


def _input(
    graph: ir.Graph, name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.INT32
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def _page(graph: ir.Graph, node: ir.Node, step: list[ir.Value]) -> None:
    module, layer = module_of(node), int(edit.attribute(node, "layer"))
    flat = []
    latent = node.attributes.get_int("value_width", 0)  # numbers of a key that are its value
    chunk = node.attributes.get_int("chunk", 0)
    for index, role in enumerate(("query", "key") if latent else ("query", "key", "value")):
        x = edit.operand(node, index)
        _, heads, _, width = edit.dims(x)
        flat.append(edit.reshape(node, token_major(node, x), [-1, heads * width], f"{module}.{role}"))
    sinks = [value for value in node.inputs[3:] if value is not None]
    _, heads, _, width = edit.dims(edit.operand(node, 0))
    _, kv_heads, _, value_width = edit.dims(edit.operand(node, 1 if latent else 2))
    value_width = latent or value_width
    dtype = flat[0].dtype
    assert dtype is not None
    caches = [
        _input(graph, f"{role}_cache.{layer}", ["blocks", kv_heads, operator.BLOCK_SIZE, size], dtype)
        for role, size in (("key", width), ("value", 0 if latent else value_width))
        if size
    ]
    outputs = [
        ir.Value(name=f"{module}.attention", shape=ir.Shape([edit.TOKENS, heads * value_width])),
        *(
            ir.Value(name=str(cache.name).replace("_cache.", "_cache_out."), shape=cache.shape)
            for cache in caches
        ),
    ]
    for output in outputs:
        output.type = ir.TensorType(dtype)
    paged = ir.node(
        operator.NAME,
        [*flat, None, *caches, None, *step, *sinks] if latent else [*flat, *caches, *step, *sinks],
        {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "scale": float(edit.attribute(node, "scale")),
            "window": int(edit.attribute(node, "window")),
            "softcap": float(edit.attribute(node, "softcap")),
            **({"value_width": latent} if latent else {}),
            **({"chunk": chunk} if chunk else {}),
        },
        domain=operator.DOMAIN,
        outputs=outputs,
        name=f"{module}.paged_attention",
    )
    paged.metadata_props.update(node.metadata_props)
    graph.insert_before(node, paged)
    graph.outputs.extend(outputs[1:])
    edit.replace(node, edit.reshape(node, outputs[0], [1, -1, heads, value_width], f"{module}.attended"))
