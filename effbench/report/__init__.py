"""Tables, plots and comparisons of records."""
