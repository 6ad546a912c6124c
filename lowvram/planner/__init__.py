"""Memory planning: peak memory of a run, computed without torch."""
