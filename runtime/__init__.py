"""The runtime: opens bundles and serves requests without torch, transformers or onnx. Start at load.py."""
