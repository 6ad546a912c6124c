"""Read LoRA files of every spelling and merge them into the weights of an expert."""
