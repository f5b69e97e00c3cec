"""What a run does: train, compress, evaluate."""
