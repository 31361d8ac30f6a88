"""Pilots: the rounds of the simulator on real devices, each of which trains on its own images."""
