"""Scores of neurons and layers, by which partial PLMs are chosen."""
