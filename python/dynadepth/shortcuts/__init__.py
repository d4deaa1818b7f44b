"""Linear shortcuts: the low-rank affine maps that rows take in place of a layer that they skip."""
