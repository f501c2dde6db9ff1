"""Kernels written by hand, in TIR: for CPUs, for GPUs, and for both."""
