"""Datasets that are made by a rule: one file each, found by its name."""
