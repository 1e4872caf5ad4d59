"""llmc.GroupedTopK, the choice of a router with groups: spec.py is its contract, reference.py its meaning."""
