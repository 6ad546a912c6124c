"""Ops of the quantized DiT, each with a contract, a torch reference and a Triton kernel."""
