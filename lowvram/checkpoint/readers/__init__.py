"""Readers of untrusted checkpoint files."""
