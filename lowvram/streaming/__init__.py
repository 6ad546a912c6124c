"""Blocks of weights on their way from disk and RAM into the device, ahead of the computation that
needs them.
"""
