"""What a run can do: one file for each stage, which is a command too."""
