"""Opens bundles and serves requests: start at load.py. Imports neither torch nor transformers nor onnx."""
