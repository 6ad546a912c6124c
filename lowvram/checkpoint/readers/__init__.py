"""Bytes of a file to tensors, whatever the file claims."""
