"""Runs jobs, which ask a model many questions, write each answer as it is done, and resume after any kill."""
