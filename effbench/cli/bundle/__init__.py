"""All that a machine without network needs, in one folder."""
