"""Curves and other pictures."""
