"""`llmc check`: whether a checkpoint is what it says it is."""
