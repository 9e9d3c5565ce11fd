"""Rooms of the experiment, from the ground up: core, models, spectra, sparse, calibration, pruning ..."""

from lib.core.errors import UserError

__all__ = ["UserError"]
__version__ = "0.1.0"
