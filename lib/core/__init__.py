"""Core: errors, names, files, digests and processes, which every room needs."""
