"""From score tables and labels to policies that keep a budget."""
