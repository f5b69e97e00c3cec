"""Layers that share keys, values or attention maps."""
