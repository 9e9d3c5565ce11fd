"""Models: where a model comes from, and where its weights live."""
