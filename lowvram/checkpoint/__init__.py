"""What is on disk: headers, names, sources, and the store that `lowvram quantize` writes."""
