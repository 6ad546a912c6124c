"""Checkpoint layouts: the files of each component, and the config of the model."""
