"""Bytes of a run before it starts: arithmetic without torch."""
