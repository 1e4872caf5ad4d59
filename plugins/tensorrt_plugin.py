"""What llmc's TensorRT plugins have in common. They take the module of TensorRT, which this one lacks."""

from __future__ import annotations

from typing import Any


class Plugin:
    """A plugin that is core, build and runtime in one object, and keeps nothing of an execution context.

    A subclass names this class first and TensorRT's interfaces after it.
    """

    #: The operator's name, its version and its namespace.
    identity: tuple[str, str, str]
    #: The number of its outputs.
    outputs: int

    def __init__(self, attributes: Any, builds: bool) -> None:
        """attributes: those of the node
        builds: whether the builder made it, which times tactics: a plugin has only one
        """
        for interface in type(self).__bases__[1:]:
            interface.__init__(self)  # type: ignore[misc]  # each wants its own call
        self.plugin_name, self.plugin_version, self.plugin_namespace = self.identity
        self.num_outputs = self.outputs  # a property of TensorRT's
        self.attributes, self._builds = attributes, builds
        self._stored: list[Any] = []  # the memory that get_fields_to_serialize points to

    def get_capability_interface(self, kind: Any) -> Any:
        del kind  # this object is all three
        return self

    def clone(self) -> Any:
        return type(self)(self.attributes, self._builds)

    def on_shape_change(self, inputs: Any, outputs: Any) -> None:
        del inputs, outputs

    def set_tactic(self, tactic: int) -> None:
        del tactic

    def attach_to_context(self, context: Any) -> Any:
        del context
        return self.clone()


def add_creator(trt: Any, creator: Any) -> None:
    """Register a creator with the TensorRT module `trt`. Raises RuntimeError if another one has its name."""
    if not trt.get_plugin_registry().register_creator(creator, creator.plugin_namespace):
        name = f"{creator.plugin_namespace}.{creator.name}"
        raise RuntimeError(f"another {name} is registered with TensorRT already")
