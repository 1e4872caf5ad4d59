"""The native CPU engine: the graph as a program, and its weights as packed tiles. Start at lower.py."""
