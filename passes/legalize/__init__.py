"""Passes from the quantized graph to the graph that one engine takes."""
