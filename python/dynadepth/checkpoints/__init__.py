"""Trained policies on disk, beside their base model and on the hub."""
