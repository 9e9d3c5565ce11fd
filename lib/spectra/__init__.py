"""Spectra: from a matrix to its eigenvalue density and the exponent of its tail."""
