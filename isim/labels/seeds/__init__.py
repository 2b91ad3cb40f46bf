"""Seeds: hard label maps of CAMs by a threshold."""
