"""Encoders and heads as pure functions, and the layer that each parameter belongs to."""
