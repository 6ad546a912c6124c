"""Hardware: GPU, host memory, memory budgets and speeds of the machine."""
