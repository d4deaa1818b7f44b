"""What plans do to prompts: outcomes of sweeps, and tables of them."""
