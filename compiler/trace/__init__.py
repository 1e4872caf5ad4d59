"""Tracing, from a transformers model to an ONNX graph: start at export.py."""
