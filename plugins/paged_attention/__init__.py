"""llmc.PagedAttention: spec.py is its contract."""
