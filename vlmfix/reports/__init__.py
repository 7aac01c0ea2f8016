"""What people read of a comparison: tables and plots; never needs a model."""
