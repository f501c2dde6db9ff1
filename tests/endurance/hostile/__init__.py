"""Files that a stranger can give us, mutated by their structure, and what must hold whatever they are."""
