"""Weights in fewer bits, of the build's own (`--quant`) and of checkpoints that come quantized.

formats.py, quantizer.py   the formats and their arithmetic; gptq.py and smoothing.py round by what layers see
plan.py, stored_plan.py    which matrix takes which format, and why not
apply.py, kv_cache.py      put a plan, or caches in FP8, into the graph
phase.py                   makes the data in a build, by produce.py, calibrated.py, stored_arrays.py
"""
