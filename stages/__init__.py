"""The LLM build: one thin module per stage, and beside them the rooms of the domain."""
