"""What follows from the second moment of a layer's inputs: factors for GPTQ, and the error of the output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmc.runtime.errors import BuildError, CheckpointError


def output_error(rows: np.ndarray, dequantized: np.ndarray, moment: np.ndarray) -> float:
    """Return the relative error of a layer's output: sqrt(tr(D H D^T) / tr(W H W^T)), D = W - dequantized.

    rows: the weight W, [out, in]
    dequantized: W after quantization and dequantization, float32 [out, in]
    moment: the second moment H of the layer's inputs, [in, in]

    Returns 0 if the output is 0.
    """
    wide = np.asarray(rows, np.float32)
    whole = _energy(wide, moment)
    return float(np.sqrt(_energy(wide - dequantized, moment) / whole)) if whole > 0 else 0.0


def _energy(matrix: np.ndarray, moment: np.ndarray) -> float:
    """Return tr(A H A^T) = sum(H * A^T A), clamped at 0: rounding can make it negative."""
    gram = matrix.T @ matrix  # symmetric: half the work of A H
    return max(0.0, float(np.einsum("ij,ij->", gram, moment, dtype=np.float64)))


@dataclass(frozen=True)
class Factors:
    """A damped second moment as M diag(d) M^T, float32."""

    #: M, unit upper triangular, [in, in].
    unit: np.ndarray
    #: d, [in].
    pivots: np.ndarray

    @cached_property
    def diagonal(self) -> np.ndarray:
        """The diagonal of the damped moment, float32 [in]."""
        return np.square(self.unit) @ self.pivots


def factorize(moment: np.ndarray, name: str, damping: float = 0.01) -> Factors:
    """Factorize the damped second moment of a layer's inputs, in float64.

    moment: the second moment, float32 [in, in]; 0 acts as the identity
    name: the weight's name, for errors
    damping: this times the mean of the diagonal is added to the diagonal, so that inputs that calibration
        never saw are rounded to nearest

    Raises CheckpointError if `moment` is not finite, BuildError if the damped one is not positive definite.
    """
    damped = moment[::-1, ::-1].astype(np.float64)  # columns in reverse: an upper factor
    if not np.isfinite(damped.sum()):
        raise CheckpointError(
            f"the inputs of {name} are infinite or NaN on the calibration text",
            "run `llmc check CHECKPOINT`: the weights may be damaged",
        )
    mean = float(np.trace(damped)) / len(damped)
    damped[np.diag_indices_from(damped)] += damping * mean if mean else 1
    try:
        lower = np.linalg.cholesky(damped)
    except np.linalg.LinAlgError as error:
        raise BuildError(
            f"the inputs of {name} are linearly dependent: GPTQ with damping {damping:.2g} cannot use them",
            "calibrate on more text",
        ) from error
    root = np.diag(lower).copy()
    lower /= root
    unit = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    return Factors(unit, np.square(root[::-1]).astype(np.float32))
