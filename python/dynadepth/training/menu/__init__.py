"""The choice of a menu's plans and the training of its heads, on arrays."""
