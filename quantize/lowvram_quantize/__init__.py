"""The offline quantizer: converts a checkpoint to a store, resumable and in bounded memory."""
