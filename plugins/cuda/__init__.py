"""CUDA without a toolkit: compiling, loading and launching kernels, for every operator of our own."""
