"""CUDA device code without a GPU: compiled, and read back out of a library."""
