"""What a run needs and what it took."""
