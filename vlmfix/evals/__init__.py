"""Evaluations: what a model says, against what is there."""
