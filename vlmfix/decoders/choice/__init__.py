"""Ways to choose tokens, by the names of decoders."""
