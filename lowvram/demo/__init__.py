"""`lowvram demo`: a small model that ships with the package, and its synthetic clips."""
