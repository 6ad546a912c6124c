"""What counts, limits and releases memory while a run works."""
