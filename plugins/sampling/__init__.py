"""Greedy and top-k sampling beside the logits, on the GPU."""
