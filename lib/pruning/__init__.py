"""Pruning: statistics and ratios turned into zeros, and the walk over the blocks."""
