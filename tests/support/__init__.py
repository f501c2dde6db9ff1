"""What several test modules use: checkpoints, pipelines and bundles to test with, and ways to run and to check them."""
