"""A grid at work: its words, its runs, what of the machine each has, and what a person sees."""
