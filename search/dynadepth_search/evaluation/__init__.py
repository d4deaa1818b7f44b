"""Policies against their baselines on held-out prompts."""
