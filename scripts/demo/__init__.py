"""Training and judging of the demo model."""
