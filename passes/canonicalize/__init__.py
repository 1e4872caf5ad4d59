"""Passes from the traced graph to the canonical graph."""
