"""One kind of dataset a file: how its rows become texts, and texts examples."""
