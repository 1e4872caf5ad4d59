"""`llmc check`: compare a checkpoint with its configuration, and check its values."""
