"""Trace a transformers model into an ONNX graph. Start at export.py."""
