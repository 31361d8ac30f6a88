"""Evaluation of an encoder, and its export as files."""
