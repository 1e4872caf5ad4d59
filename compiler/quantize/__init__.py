"""Weights in fewer bits: those that a build makes (`--quant`), and those of pre-quantized checkpoints.

make_plan.py, prequantized_plan.py   which matrix takes which format, and why not; passes/quantize applies it
round_to_nearest.py, gptq.py         the arithmetic, with scales.py; smoothquant.py smooths activations first
step.py                              makes the data, by the modules produce*.py and prequantized_arrays.py
"""
