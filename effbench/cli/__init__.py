"""Commands, and what they print before a run or in its place."""
