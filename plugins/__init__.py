"""The operators of llmc's own, one folder each."""
