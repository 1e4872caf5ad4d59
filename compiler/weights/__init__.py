"""The files that hold an engine's weights."""
