"""Converts a checkpoint's tensors to stored weights, in parallel and in bounded memory; what is known is reused."""
