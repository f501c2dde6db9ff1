"""Converts a checkpoint's tensors to stored weights, in parallel, in bounded memory; earlier conversions are reused."""
