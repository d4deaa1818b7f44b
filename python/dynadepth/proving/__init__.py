"""Proofs: whether a model runs exactly, found out on a tiny random copy made from its own config."""
