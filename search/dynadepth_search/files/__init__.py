"""Files that survive their writers: locks, journals, seals, and values that are checked when they are read back."""
