"""The machine: GPU, host memory, budgets and the profile that predictions start from."""
