"""How one call decodes: rows, passes, and the choice of tokens."""
