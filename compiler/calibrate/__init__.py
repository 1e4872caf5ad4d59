"""Calibration: a model's activations, measured on a text, for scales and for GPTQ.

text/           the text used by default: tales, a scene, code, facts; written for this purpose
source.py       the text or the table that a build calibrates on
run_layers.py   runs the canonical graph a layer at a time: the inputs of each linear layer and of the cache;
                steps.py packs the windows of the text, subgraph.py runs a part of the graph
ranges.py       magnitudes of such inputs: the largest, a percentile, the best range for FP8
table.py        these figures for a whole model, as a file

`quantize/gptq.py` rounds weights with the inputs that `run_layers.py` gives.
"""
