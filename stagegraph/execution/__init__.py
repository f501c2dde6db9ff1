"""Executes plans: worker processes, their private directories, and how nodes end."""
