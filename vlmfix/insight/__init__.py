"""What a model attends to, says and keeps in its hidden states, found by looking at single passes."""
