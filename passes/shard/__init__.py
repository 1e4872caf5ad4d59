"""Tensor parallelism: the part of a graph that each rank computes."""
