"""What is seen of late exits: of their heads, and of their evaluation."""
