"""Directions in a model's streams and KV cache, measured on pictures whose objects are known, and kept in files."""
