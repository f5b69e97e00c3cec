"""The trust of a compressed model: questions made here, and how answers are judged."""
