"""Machine of a run: processes, devices, memory, helpers, files, identities and kernels."""
