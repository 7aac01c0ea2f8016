"""What every decoder does to the embedded models: `python -m tools.study --out DIR`."""
