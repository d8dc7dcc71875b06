"""Stages and schedules, and the controller of `auto`. No torch."""
