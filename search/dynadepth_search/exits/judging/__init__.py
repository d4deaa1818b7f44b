"""Late exits on held-out prompts: what they wrote, what it cost, and what static plans of equal passes keep."""
