"""`lowvram doctor`: measures this machine, checks its kernels and reports what is missing."""
