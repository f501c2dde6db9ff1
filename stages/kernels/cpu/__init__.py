"""Kernels for CPUs, in float32, written in vectors of lanes."""
