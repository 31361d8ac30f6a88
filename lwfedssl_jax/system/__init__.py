"""The machine: errors and exit codes, signals, files, devices, and random streams."""
