"""Numbers that tell how even a sweep is."""
