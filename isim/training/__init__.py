"""Training: the loop over epochs, its batches and steps, and when rounds are due."""
