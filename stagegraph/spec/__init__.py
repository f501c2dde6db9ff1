"""What a pipeline file says: read with places, laid over one another, resolved and checked."""
