"""A provider of small stages for the harnesses."""
