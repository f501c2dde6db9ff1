"""Calibration: measures the activations that each matrix reads when the original model runs on sample text."""
