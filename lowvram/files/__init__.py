"""Atomic writes, reads that are repeated, locks and the cache folder."""
