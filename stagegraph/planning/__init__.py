"""Plans: the graph, the digests of sources and code, and the keys that decide what must run."""
