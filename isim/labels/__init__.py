"""From CAMs to label maps: arrays in, arrays out."""
