"""Layers that are alike, and models whose layers share states."""
