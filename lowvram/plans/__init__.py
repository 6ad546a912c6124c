"""`lowvram plan`: plans of a store, a variant or a card, and the table of what fits."""
