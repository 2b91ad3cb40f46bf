"""Cleaning: small parts and holes of label maps."""
