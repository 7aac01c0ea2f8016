"""What every decoder does to the embedded models: `python -m vlmfix.evals.effects --out DIR`."""
