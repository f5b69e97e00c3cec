"""Time, memory, counts and the environment they were taken in."""
