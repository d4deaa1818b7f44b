"""Adapters of dynadepth to other libraries."""
