"""The targets `tensorrt-rtx` and `tensorrt`. Start at target.py."""
