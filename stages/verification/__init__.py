"""How a bundle is held against its checkpoint: its weights, the logits and text of a reference, its own functions."""
