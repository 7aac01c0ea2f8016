"""Reads from single passes what a model attends to, says and keeps in its hidden states."""
