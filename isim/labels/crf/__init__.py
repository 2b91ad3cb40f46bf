"""Fully connected CRF: refinement of label maps along an image's edges."""
