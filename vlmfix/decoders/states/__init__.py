"""Methods that edit what the model keeps: the KV cache and the residual stream."""
