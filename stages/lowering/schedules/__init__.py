"""How the loops of kernels are scheduled: the rules by name, those of ours, and the memo of what came out."""
