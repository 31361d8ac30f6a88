"""What a fleet of devices can afford."""
