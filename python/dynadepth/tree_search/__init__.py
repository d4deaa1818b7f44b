"""The search for the plan of each prompt, over the Rust core."""
