"""`lowvram doctor`: measure the machine, check the kernels and report what is missing."""
