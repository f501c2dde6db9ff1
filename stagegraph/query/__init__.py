"""Questions about results: what one is, where it comes from, how two differ, what may go."""
