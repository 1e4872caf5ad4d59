"""Tensor parallelism: the ranks of a model, and the collectives through which they exchange activations."""
