"""Data: sources, prepared items, crops, label sets, and the files they are stored in."""
