"""The trainer of the embedded models: `python -m tools.training --out DIR`."""
