"""The store: the folder of quantized weights that `lowvram quantize` writes."""
