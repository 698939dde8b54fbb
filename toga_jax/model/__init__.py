"""The Llama model: weights, blocks, forward pass."""
