"""Packed weights: storage formats and the arithmetic on them."""
