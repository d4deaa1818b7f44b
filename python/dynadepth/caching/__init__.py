"""Key-value caches with one slot for each visit of a decoder layer."""
