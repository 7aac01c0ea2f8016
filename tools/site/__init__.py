"""Builds the documentation site: what mkdocs is told by hooks, and what of its pages is generated."""
