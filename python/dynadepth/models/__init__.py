"""Base models: which are supported, where their layers are, which one this is."""
