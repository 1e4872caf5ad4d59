"""Greedy and top-k sampling without a copy of the logits: the launches after a step, and their results."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llmc.plugins.cuda.kernel import KernelImage, Kernels
from llmc.plugins.sampling import launch
from llmc.runtime.backends.base import Candidates
from llmc.runtime.backends.tensorrt.cuda import Cuda, aligned_offsets


class TokenSampler:
    """The sampling kernels and the memory for their results. Its methods raise CudaError.

    The kernels are launched one by one after a step's CUDA graph. k differs between steps, so a graph would
    have to be captured for each k.
    """

    def __init__(self, cuda: Cuda, images: Iterable[KernelImage], logits: int, host: np.ndarray) -> None:
        """Load the kernels and allocate their memory.

        logits: the device address of float32 [R, vocab].
        host: pinned memory of the same shape, for rows that are copied whole.
        """
        self._cuda, self._host = cuda, host
        rows, self._vocab = host.shape
        result = 4 * rows * launch.width(launch.MAX_K)
        sizes = {"result": result, **launch.scratch(rows, self._vocab)}
        offsets, nbytes = aligned_offsets(list(sizes.values()))
        first = cuda.allocate(nbytes)
        self._arguments = {name: first + at for name, at in zip(sizes, offsets, strict=True)}
        self._arguments |= {"logits": logits, "vocab": self._vocab, "parts": launch.parts(self._vocab)}
        self._result = cuda.pinned(result).view(np.int32)
        self._kernels = Kernels(images, launch.ARGUMENTS)

    def candidates(self, rows: int, k: int) -> list[Candidates]:
        """Wait for the stream, and return the candidates of the first `rows` rows. See `SamplingBackend`."""
        arguments = {**self._arguments, "k": k}
        for kernel, grid in launch.launches(rows, self._vocab, k):
            self._kernels.launch(launch.variant(kernel), grid, arguments, self._cuda.stream)
        result = self._result[: rows * launch.width(k)].reshape(rows, -1)
        self._cuda.download(arguments["result"], result)
        self._cuda.wait()
        answers = launch.read(result, k)
        whole = [row for row, answer in enumerate(answers) if answer is None]
        for row in whole:
            self._cuda.download(arguments["logits"] + row * self._host[row].nbytes, self._host[row])
        if whole:
            self._cuda.wait()
        return [
            Candidates(*answer) if answer else Candidates(None, self._host[row])
            for row, answer in enumerate(answers)
        ]

    def close(self) -> None:
        """Unload the kernels."""
        self._kernels.close()
