"""Decodes one call: stacks its rows, runs the model's passes and chooses tokens."""
