"""How policies are trained from features and scores."""
