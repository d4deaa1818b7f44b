"""The search for plans: static ones for all prompts, and one for each prompt."""
