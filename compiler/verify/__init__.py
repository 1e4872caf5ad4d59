"""Compare an engine with its checkpoint. A build starts at prove.py, `llmc verify` at judge.py."""
