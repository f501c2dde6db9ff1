"""Checks a bundle against its checkpoint: weights, a reference's logits and text, and its own functions."""
