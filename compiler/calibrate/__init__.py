"""What a model's activations look like, measured on a text: for scales, and for rounding by its inputs.

text/           the text used when none is given: tales, a scene, code, facts; written for this purpose
sequences.py    a text as sequences of token ids
layers.py       runs the canonical graph a layer at a time: what enters each linear layer and the cache;
                steps.py packs the sequences, piece.py runs a part of the graph
ranges.py       magnitudes of such inputs: the largest, a percentile, the best range for FP8
table.py        these figures for a whole model, as a file

`quantize/gptq.py` rounds weights with the inputs of `layers.py`.
"""
