"""Random-access sources of records."""
