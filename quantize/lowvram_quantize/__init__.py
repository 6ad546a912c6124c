"""The offline quantizer: any checkpoint that `lowvram.checkpoint` reads becomes a store, in bounded
memory and resumable.
"""
