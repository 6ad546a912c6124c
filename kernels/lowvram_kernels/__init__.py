"""Ops of the quantized DiT: a contract, a torch reference and a Triton kernel each."""
