"""Checks of engines: `compare` runs one beside the reference, `refit` shows that new weights reach it."""
