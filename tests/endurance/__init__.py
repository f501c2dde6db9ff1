"""What docs/guarantees.md rests on: each harness has a fast part, and a long one marked ``endurance``."""
