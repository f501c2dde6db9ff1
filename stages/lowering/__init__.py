"""From exported graphs to one library: the passes, one per file, and the phased list that orders them."""
