"""The words of a command to a checked job."""
