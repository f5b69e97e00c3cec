"""One dimension of trust per file, found by the name of the file."""
