"""Formats of other tools: labels read from them, masks written for them."""
