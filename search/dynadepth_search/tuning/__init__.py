"""Studies of settings: of a menu's training on a score table, and of the per-prompt search on replayed tables."""
