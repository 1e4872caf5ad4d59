"""Quantized linear layers and KV caches in the graph, and the facts about formats."""
