"""Core: errors, files, digests and processes, which every room needs."""
