"""Load a bundle and run it; needs the standard library, numpy, tokenizers and TVM's runtime, nothing of the build."""
