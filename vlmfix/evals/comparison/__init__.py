"""Statistics of runs, and comparisons between them."""
