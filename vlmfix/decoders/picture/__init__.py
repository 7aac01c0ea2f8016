"""Methods that change which pictures the model sees."""
