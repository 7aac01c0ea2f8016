"""The search for a decoder's parameters."""
