"""Proof that the numbers hold: one file per family of checks, each with a function `run`."""
