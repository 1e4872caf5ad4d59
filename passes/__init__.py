"""The passes that rewrite the graph, from the traced one to an engine's file. Start at pipeline.py."""
