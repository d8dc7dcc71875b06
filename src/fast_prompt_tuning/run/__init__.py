"""A run, from recipe to result folder."""
