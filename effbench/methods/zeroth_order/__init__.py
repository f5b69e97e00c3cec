"""Training from forward passes alone."""
