"""Calibration: measure a model's activations on a text, for static scales and for GPTQ.

text/           the default text: tales, a scene, code, facts; written for this purpose
source.py       reads the text or the table that a build calibrates on
run_layers.py   runs the canonical graph a layer at a time and yields the inputs of each linear layer and of
                the KV cache; steps.py packs the windows of the text, subgraph.py runs a part of the graph
statistics.py   computes what is kept of these inputs: clip ranges, and second moments for GPTQ
cache.py        keeps the statistics on disk, for the next build of the same checkpoint
ranges.py       computes clip ranges of these inputs: largest magnitude, percentile, least squared error
table.py        stores the clip ranges of a whole model in a file

`quantize/gptq.py` quantizes weights with the second moments.
"""
