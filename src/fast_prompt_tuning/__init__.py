"""Fast Prompt Tuning: tune a soft prompt on a growing partial model."""
