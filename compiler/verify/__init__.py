"""Compares an engine with its checkpoint: start at prove.py; `llmc verify` starts at judge.py."""
