"""Weights in fewer bits: the formats (formats.py), their arithmetic (quantizer.py), who takes which
(plan.py).

Numbers and names only; no graph is read or changed here.
"""
