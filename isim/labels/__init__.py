"""Label maps from CAMs, arrays or tensors in and out: one folder a method."""
