"""The comparison of policies with their baselines on held-out prompts."""
