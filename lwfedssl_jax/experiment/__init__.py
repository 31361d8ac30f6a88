"""One run from its config to its summary, with progress and trackers."""
