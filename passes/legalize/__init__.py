"""Passes from the quantized graph to what one engine takes."""
