"""Pre-quantized checkpoints: the schemes that they declare, and their tensors."""
