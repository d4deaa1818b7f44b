"""What a comparison of policies may claim; works on arrays of outcomes."""
