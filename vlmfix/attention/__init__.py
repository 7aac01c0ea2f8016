"""Edits attention: declares the changes that a method may make inside attention, and applies them in one function."""
