"""`llmc check`: compares a checkpoint with its configuration, and examines its values."""
