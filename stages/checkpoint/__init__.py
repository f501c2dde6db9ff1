"""Reads a checkpoint's folder strictly: files, headers, tensors and settings; its code is never run."""
