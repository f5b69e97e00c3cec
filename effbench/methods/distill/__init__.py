"""A teacher's outputs as the target."""
