"""Trace a transformers model into an ONNX graph: start at export.py."""
