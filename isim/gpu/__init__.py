"""Code of `labels` in PyTorch, which `labels` itself must not load: batched, for CUDA devices."""
