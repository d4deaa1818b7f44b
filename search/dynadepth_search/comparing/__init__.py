"""Several wrapped configurations of one model on one task: what they write, beside each other."""
