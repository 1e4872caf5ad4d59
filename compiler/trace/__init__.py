"""From a transformers model to a traced ONNX graph: start at export.py."""
