"""Assembles bundles: the files that are copied, and the documents that describe them."""
