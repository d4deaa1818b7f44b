"""`dynadepth demo`: the whole way on one small model, in steps that each have a command of their own."""
