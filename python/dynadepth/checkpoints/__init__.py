"""Trained policies: on disk, beside their base model, on the hub."""
