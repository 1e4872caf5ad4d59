"""The native CPU engine: lower the graph to a program, and pack its weights in tiles. Start at lower.py."""
