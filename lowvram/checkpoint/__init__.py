"""Checkpoints: open a model in any supported layout as named tensors."""
