"""Compare an engine with its checkpoint. A build starts at verify_build.py, `llmc verify` at judge.py."""
