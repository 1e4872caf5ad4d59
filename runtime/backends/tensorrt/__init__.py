"""TensorRT on NVIDIA GPUs: start at load.py."""
