"""Offers ways to choose tokens as decoders."""
