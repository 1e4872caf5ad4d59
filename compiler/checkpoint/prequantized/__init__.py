"""Checkpoints whose weights are quantized already: their declared scheme, and their tensors."""
