"""Neurons, heads and widths taken away."""
