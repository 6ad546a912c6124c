"""Budgets: what a run will need, computed before it, and the memory it then works in."""
