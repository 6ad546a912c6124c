"""Predicted times of a run, computed without torch."""
