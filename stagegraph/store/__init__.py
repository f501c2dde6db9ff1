"""What is kept: objects and documents by digest, the index, the journal, and artifacts/ as people see it."""
