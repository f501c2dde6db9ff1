"""Calibration: the original model on sample text, and how large the activations are that each matrix reads."""
