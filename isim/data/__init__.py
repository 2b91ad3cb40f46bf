"""Sources, files and the training set."""
