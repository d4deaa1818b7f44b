"""Exit heads: trained without labels on the base model's own states, and calibrated on text that exits produced."""
