"""llmc.HeadLinear, a linear layer of each head: spec.py is its contract, reference.py its meaning."""
