"""Quantized weights: those that a build makes (`--quant`), and those of pre-quantized checkpoints.

make_plan.py, prequantized_plan.py   the format of each matrix, or why it has none; passes/quantize applies it
round_to_nearest.py, gptq.py         the arithmetic, with scales.py; smoothquant.py smooths activations first
step.py                              makes the arrays, with produce*.py and prequantized_arrays.py
"""
