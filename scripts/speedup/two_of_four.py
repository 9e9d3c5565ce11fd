"""A 2:4 checkpoint becomes a model with semi-structured matrices on a CUDA device, timed against the dense one."""
