"""Checkpoints that come quantized: what their tensors are, their values, and what is wrong with them."""
