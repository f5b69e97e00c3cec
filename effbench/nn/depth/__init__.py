"""Models of fewer layers, and layers that some tokens skip."""
