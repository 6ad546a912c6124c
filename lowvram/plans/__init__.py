"""`lowvram plan`: memory plans of a store, a variant or a card, and the matrix of what fits."""
