"""Traces transformers' own modelling code, without weights, into a graph of few operators. Needs torch."""
