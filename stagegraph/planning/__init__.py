"""What would run and why: the graph, the digests of sources and code, and the key that decides."""
