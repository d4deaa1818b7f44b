"""The adapter for lm-evaluation-harness (`dynadepth-search[lm-eval]`); lm-eval is imported when it is used."""
