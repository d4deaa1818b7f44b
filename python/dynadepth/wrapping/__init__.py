"""`wrap_model` and what it puts on a model; plans baked into ordinary models."""
