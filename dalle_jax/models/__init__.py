"""One file a network: a module and its VARIANTS."""
