"""The soft prompt, where it stands, the states of texts, and what it answers."""
