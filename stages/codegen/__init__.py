"""What a compiled library is made of, and what a reader sees of it."""
