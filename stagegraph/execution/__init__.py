"""Running what a plan says has to: worker processes, their private directories, and how nodes end."""
