"""What a model's activations look like, measured on a text: for scales and for rounding that knows its inputs.

text/           the text used when none is given: tales, a scene, code, facts; written for this purpose
sequences.py    a text as sequences of token ids
layers.py       runs the canonical graph a decoder layer at a time: what enters every linear layer and cache
ranges.py       magnitudes of such inputs: the largest, a percentile, the best range for FP8
table.py        these figures for a whole model, as a file

`quantize/gptq.py` rounds weights with the inputs of `layers.py`.
"""
