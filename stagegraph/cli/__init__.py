"""The command line: one module per verb, and what they share. Only here does the engine print or exit."""
