"""The files that `lowvram quantize` writes."""
