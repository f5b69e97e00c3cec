"""Which blocks matter, and models without the others."""
