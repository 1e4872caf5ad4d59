"""The native CPU engine's program: what it is, how it is checked, and how a machine runs it."""
