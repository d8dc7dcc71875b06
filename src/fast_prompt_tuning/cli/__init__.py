"""The command `fpt`."""
