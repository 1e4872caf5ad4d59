"""llmc.RoundFP4, activations rounded to NVFP4: spec.py is its contract, body.py its meaning in ONNX."""
