"""Methods that contrast or reject tokens by their logits."""
