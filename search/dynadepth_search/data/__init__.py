"""Tasks: read, encoded as tokens, split, fetched."""
