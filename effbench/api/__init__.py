"""The contracts that all rooms speak, without torch."""
