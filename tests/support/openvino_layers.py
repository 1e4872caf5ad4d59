"""The kernels that OpenVINO runs the matrices of a model with, and a first step for them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from llmc.runtime.backends.openvino.backend import OpenVinoBackend
from llmc.runtime.batch import Batch


def layers_of(backend: OpenVinoBackend) -> tuple[Counter[str], list[str]]:
    """Return how many matrices each kind of kernel multiplies, and the types of the large constants."""
    kinds: Counter[str] = Counter()
    constants = []
    for node in backend._request.get_compiled_model().get_runtime_model().get_ops():
        info = node.get_rt_info()
        layer = info["layerType"].astype(str)
        if layer == "FullyConnected":
            kinds[info["primitiveType"].astype(str).rpartition("_")[2]] += 1
        elif layer == "Const" and len(node.get_output_shape(0)) == 2 and min(node.get_output_shape(0)) > 1:
            constants.append(node.get_output_element_type(0).get_type_name())
    return kinds, constants


def prompt() -> Batch:
    """Return the first step of one sequence, with the logits of every token."""
    ids = np.random.default_rng(0).integers(3, 4000, 40)
    return Batch.pack([(ids.tolist(), 0, [0, 1], range(40))])
