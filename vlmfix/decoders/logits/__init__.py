"""Holds the methods that contrast or reject tokens by their logits."""
