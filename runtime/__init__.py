"""llmc."""
