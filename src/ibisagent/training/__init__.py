"""Training recipes for the weights that the package carries."""
