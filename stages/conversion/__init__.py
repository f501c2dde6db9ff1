"""From a checkpoint to stored weights: which tensors are read, made or reused, by which thread, in how much memory."""
