"""The DiT, the UMT5 encoder and the VAE, each computed from streamed or tiled pieces."""
