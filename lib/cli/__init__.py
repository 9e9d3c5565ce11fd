"""Command line: flags, settings and the task that they describe."""
