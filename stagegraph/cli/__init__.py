"""The command line: one module per verb, and helpers that verbs share. Nowhere else does the engine print or exit."""
