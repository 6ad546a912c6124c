"""The offline quantizer: convert a checkpoint to a store, resumable and in bounded memory."""
