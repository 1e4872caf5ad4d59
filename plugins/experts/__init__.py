"""llmc.Experts, a mixture of experts: spec.py is its contract, reference.py its meaning, cpu/ its kernels."""
