"""Independent tokenizers that an emitted one is compared with: transformers, tiktoken, and plain loops."""
