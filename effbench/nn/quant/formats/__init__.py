"""Packed weight formats, one a file; `effbench.api.weights` finds them by name."""
