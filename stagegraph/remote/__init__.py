"""Results that several machines share: where they are kept, whose are believed, and how they come and go."""

EXECUTORS = ("local", "dask")  # where nodes run
