"""The targets `tensorrt-rtx` and `tensorrt`: start at target.py."""
