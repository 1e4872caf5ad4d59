"""The rewrites between the traced and the canonical graph: start at pipeline.py."""
