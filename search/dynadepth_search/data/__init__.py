"""Tasks: reading, encoding as tokens, splitting and downloading."""
