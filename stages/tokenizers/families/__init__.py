"""Tokenizer families: one module for each way in which checkpoints store a vocabulary."""
