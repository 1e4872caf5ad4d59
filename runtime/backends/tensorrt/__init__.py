"""The TensorRT backend, on NVIDIA GPUs. Start at load.py."""
