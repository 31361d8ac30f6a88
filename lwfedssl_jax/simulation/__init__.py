"""Lanes of clients, the compiled round, and the simulator that runs rounds on the devices."""
