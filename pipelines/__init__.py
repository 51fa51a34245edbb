"""Composes the two groups for a model: one file per model family, launchers, engine, command line."""
