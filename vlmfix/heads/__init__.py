"""What heads and hidden states of a model do, measured on the model itself."""
