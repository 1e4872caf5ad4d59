"""Opens bundles and serves requests: start at llm.py. Imports neither torch nor transformers nor onnx."""
