"""Encoders and SSL heads."""
