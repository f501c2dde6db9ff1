"""transformers' own modelling code, traced without weights into a graph of few operators. Needs torch."""
