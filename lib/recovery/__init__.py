"""Recovery: the dense model distilled into the weights that pruning left, and the walk that takes gradients there."""
