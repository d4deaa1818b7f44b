"""Drafts for lossless decoding: where they come from beside exits, and whether they are worth their time."""
