"""One forward pass in which each decoder layer runs as a plan says."""
