"""Late exits: new tokens that stop at a layer, and the layers that they owe."""
