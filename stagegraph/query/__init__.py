"""Queries about results: their contents, lineage, differences, and what garbage collection may remove."""
