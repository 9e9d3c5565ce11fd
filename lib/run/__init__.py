"""Run: one experiment, its steps and what it leaves behind."""
