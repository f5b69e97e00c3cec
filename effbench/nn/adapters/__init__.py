"""What is trained beside a weight, and how it is merged."""
