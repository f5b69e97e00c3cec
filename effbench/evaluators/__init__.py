"""One evaluator per file."""
