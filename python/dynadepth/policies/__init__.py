"""What turns a prompt into a plan, and which penalty keeps a budget."""
