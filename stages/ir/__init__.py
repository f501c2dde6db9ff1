"""Knowledge of TVM's IR: quirks of the pinned version, digests of kernels, and text without source locations."""
