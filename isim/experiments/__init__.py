"""Experiments: the paper's cells, presets, and tables of what was measured."""
