"""Tools to inspect results: tensors by name, plots of errors, and differences between two results."""
