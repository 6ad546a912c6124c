"""Streaming: load blocks of weights from disk and RAM to the device ahead of their computation."""
