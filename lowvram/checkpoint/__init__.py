"""Checkpoints in any layout: from files to named tensors."""
