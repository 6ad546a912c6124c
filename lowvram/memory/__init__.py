"""Allocate, limit, measure and release memory during a run."""
