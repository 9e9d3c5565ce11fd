"""Calibration: from text to windows, hidden states and statistics of each layer's inputs."""
