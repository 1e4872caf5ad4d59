"""NamePlugins and RemovePlugins: attention as TensorRT's parser finds it, and as every ONNX runtime does.

before  PagedAttention<...>(...)
after   PagedAttention<..., plugin_namespace, plugin_version>(...)
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.geometry import attention_nodes
from llmc.passes.spec import Stage, module_of
from llmc.plugins.paged_attention import tensorrt_plugin as plugin
from llmc.runtime.errors import BuildError

_FIELDS = {"plugin_namespace": plugin.NAMESPACE, "plugin_version": plugin.VERSION}


class NamePlugins:
    """Counts one match per attention layer. dtype: what they must compute in; called: what users call it.

    Raises BuildError if a layer computes in another dtype.
    """

    name = "name-plugins"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, dtype: ir.DataType, called: str) -> None:
        self._dtype, self._called = dtype, called

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in attention_nodes(model):
            if (found := edit.operand(node, 0).dtype) != self._dtype:
                raise BuildError(
                    f"{module_of(node)} computes in {found}, the TensorRT engine in {self._called}"
                )
            matches.count += _FIELDS.keys() - node.attributes.keys() != set()
            for name, value in _FIELDS.items():
                node.attributes[name] = ir.AttrString(name, value)
        return matches


class RemovePlugins:
    """Counts one match per attention layer, and one per function in TensorRT's operators."""

    name = "remove-plugins"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in attention_nodes(model):
            matches.count += _FIELDS.keys() & node.attributes.keys() != set()
            for name in _FIELDS:
                node.attributes.pop(name, None)
        foreign = [key for key, function in model.functions.items() if "trt" in function.opset_imports]
        for key in foreign:
            del model.functions[key]
        model.graph.opset_imports.pop("trt", None)
        return Matches(matches.count + len(foreign))
