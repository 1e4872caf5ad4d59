"""The arrays of a step, on the host and on the GPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.runtime.backends.tensorrt.cuda import Cuda, aligned_offsets
from llmc.runtime.backends.tensorrt.step import fill
from llmc.runtime.batch import STEP_INPUTS, Batch

_LONGEST = "block_indices"  # last, because a step uses only the first part of it


class StepArrays:
    """Pinned arrays and their counterparts on the GPU, in the same layout: one copy moves a step."""

    def __init__(self, cuda: Cuda, most: Mapping[str, int]) -> None:
        """Allocate the arrays. most: array of `Batch` -> its maximum number of elements. Raises CudaError."""
        self._cuda = cuda
        names = sorted(STEP_INPUTS, key=lambda name: name == _LONGEST)
        offsets, nbytes = aligned_offsets([4 * most[name] for name in names])
        self._pinned, self._device = cuda.pinned(nbytes), cuda.allocate(nbytes)
        self._pinned[:] = 0  # elements that no step has written are copied too
        self._longest_at = offsets[-1]
        self._arrays = {
            name: self._pinned[at : at + 4 * most[name]].view(np.int32)
            for name, at in zip(names, offsets, strict=True)
        }
        #: Array of `Batch` -> its address on the GPU.
        self.addresses = {name: self._device + at for name, at in zip(names, offsets, strict=True)}

    def upload(self, batch: Batch, bucket: int | None) -> dict[str, int]:
        """Write a step, padded if there is a bucket, and start its copy to the GPU.

        The arrays must not be written again before the copy is done. Returns and raises as `fill` does.
        """
        lengths = fill(batch, bucket, self._arrays)
        used = self._longest_at + 4 * lengths[_LONGEST]
        self._cuda.upload(self._pinned[:used], self._device)
        return lengths
