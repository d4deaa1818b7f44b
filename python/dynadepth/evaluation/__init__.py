"""Statistics for comparing policies, on arrays of outcomes."""
