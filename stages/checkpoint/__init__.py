"""What lies in a checkpoint's folder: files, headers, tensors and settings, read strictly, none of it ever run."""
