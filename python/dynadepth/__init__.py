"""Dynamic depth for frozen language models."""
