"""The GPUs that kernels are compiled for."""

from __future__ import annotations

# Compute capabilities, 89 for 8.9.
SMS = (80, 86, 89, 90, 100, 120)
# Maximum shared memory of a thread block in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
