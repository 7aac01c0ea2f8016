"""Holds the methods that change which pictures the model sees."""
