"""Tuned prompts in other people's programs."""
