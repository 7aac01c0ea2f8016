"""Attention edits: what a method may change inside attention, and the one function that applies it."""
