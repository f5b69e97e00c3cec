"""Models read out after fewer layers, or with layers skipped."""
