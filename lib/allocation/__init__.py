"""Allocation: numbers by layer turned into ratios within the budget."""

from lib.allocation.formulas import heavy_tailed

__all__ = ["heavy_tailed"]
