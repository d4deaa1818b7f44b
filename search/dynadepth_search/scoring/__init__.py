"""The effects of plans on prompts: outcomes of sweeps, and tables of outcomes."""
