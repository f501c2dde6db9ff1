"""What people look at results with: tensors by name, pictures of errors, and what differs between two results."""
