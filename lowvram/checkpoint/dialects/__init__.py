"""How weights are stored in a file, to tensors in a floating-point dtype."""
