"""The engine: a YAML-defined DAG of content-hashed stages. Knows nothing of language models or compilers."""
