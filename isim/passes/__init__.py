"""Passes over images: each computes something of every image, once."""
