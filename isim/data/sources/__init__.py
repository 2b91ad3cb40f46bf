"""Data sources: a reader each, and the form that all of them read into."""
