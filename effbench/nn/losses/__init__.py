"""What is minimised, and distances between distributions."""
