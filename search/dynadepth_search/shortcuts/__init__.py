"""Shortcuts fitted, chosen and distilled on prompts and on what the model itself says to them."""
