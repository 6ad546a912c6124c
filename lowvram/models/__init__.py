"""Models: the DiT and the UMT5 encoder, computed block by block, and the VAE, tile by tile."""
