"""What a bundle is made of: the files that are copied, and the documents that are written about them."""
