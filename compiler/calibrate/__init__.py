"""Calibration: a model's activations, measured on a text, for scales and for GPTQ.

text/           the default text: tales, a scene, code, facts; written for this purpose
source.py       the text or the table that a build calibrates on
run_layers.py   runs the canonical graph a layer at a time: the inputs of each linear layer and of the cache;
                steps.py packs the windows of the text, subgraph.py runs a part of the graph
ranges.py       clip ranges of these inputs: the largest magnitude, a percentile, the least error in FP8
table.py        the clip ranges of a whole model, as a file

`quantize/gptq.py` quantizes weights with the inputs that `run_layers.py` yields.
"""
