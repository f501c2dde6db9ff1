"""Loop schedules of kernels: the rules by name, our own rules, and the memo of their results."""
