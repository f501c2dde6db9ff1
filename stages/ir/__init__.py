"""What we know of TVM's IR: quirks of the pinned version, digests of kernels, and texts without places."""
