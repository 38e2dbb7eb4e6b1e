"""Is an engine right? `compare` runs it beside the reference, `refit` shows that new weights reach it."""
