"""A release gate: one verdict over several metrics, from a policy."""
