"""Quantization formats, and the passes that quantize linear layers and KV caches."""
